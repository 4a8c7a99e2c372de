# SPDX-License-Identifier: LGPL-2.1-or-later
"""The times of a disk's chunks, short enough for vm.json: what `restore` compares the restored files' times with.

    {"seconds": [1764070000, 1764156400], "chunks": "eJxjZGBg..."}

`seconds` are the different times, rounded down, for many tools keep no more. `chunks` says for each chunk which of them
it has: two bytes, the lower one first, packed by zlib (RFC 1950) and base64. 65,536 chunks of 365 times take 100 KB.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from array import array
from collections.abc import Sequence

SECOND = 10**9  # nanoseconds
WIDTH = 2  # bytes a chunk


def pack(times: array[int]) -> dict[str, object]:
    """`times` in nanoseconds since the epoch, at most 65,536 of them."""
    seconds = sorted({time // SECOND for time in times})
    place = {second: number.to_bytes(WIDTH, "little") for number, second in enumerate(seconds)}
    packed = zlib.compress(b"".join(place[time // SECOND] for time in times), 9)
    return {"seconds": seconds, "chunks": base64.b64encode(packed).decode()}


def unpack(seconds: Sequence[int], chunks: str, count: int) -> array[int]:
    """The time of each of `count` chunks, in seconds. Raises ValueError where it is not what `pack` made of so many."""
    try:
        unpacking = zlib.decompressobj()
        content = unpacking.decompress(base64.b64decode(chunks, validate=True), count * WIDTH + 1)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(str(error)) from None
    if len(content) != count * WIDTH:
        raise ValueError(f"it is not of {count} chunks")
    places = (int.from_bytes(content[start : start + WIDTH], "little") for start in range(0, len(content), WIDTH))
    try:
        return array("q", [seconds[place] for place in places])
    except (IndexError, TypeError, OverflowError) as error:
        raise ValueError(str(error)) from None
