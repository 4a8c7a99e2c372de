# SPDX-License-Identifier: LGPL-2.1-or-later
"""How large a disk must be by its own partition table: where vm.json is missing, nothing else tells a missing end."""

from __future__ import annotations

import logging
import struct
from pathlib import Path

from qfsbackup.backup.described import HINT, TAKE_TORN
from qfsbackup.errors import EXIT_SYSTEM, UserError

log = logging.getLogger(__name__)

HEAD = 8192  # bytes of a disk's beginning in which its partition table is found
SECTORS = (512, 4096)  # bytes
GPT = struct.Struct("<8s24xQ")  # signature, where the header's copy is: the last sector (UEFI 2.10, table 5.5)
MBR = struct.Struct("<B3xB3xII")  # status, type, first sector, sectors (UEFI 2.10, table 5.1)
PROTECTIVE = 0xEE  # the type of a partition which stands for a GPT


def check_end(first: Path, size: int, *, torn: bool) -> None:
    """Raise UserError where a disk of `size` bytes that begins with the chunk `first` ends too early.

    Its partition table tells. `torn`: only say it.
    """
    try:
        with first.open("rb") as file:
            least = least_size(file.read(HEAD))
    except OSError as error:
        raise UserError(f"cannot read {first}: {error.strerror}", HINT, EXIT_SYSTEM) from None
    if least <= size:
        return
    what = f"chunks are missing at the end: by the partition table there are {least} bytes at least, these are {size}"
    if not torn:
        raise UserError(what, f"{HINT} {TAKE_TORN}", EXIT_SYSTEM)
    log.warning("%s; taken all the same", what)


def least_size(head: bytes) -> int:
    """The bytes that the disk which begins with `head` must have at least; 0 where no partition table says it."""
    return max(_by_gpt(head), _by_mbr(head))


def _by_gpt(head: bytes) -> int:
    for sector in SECTORS:
        if len(head) >= sector + GPT.size:
            signature, copy = GPT.unpack_from(head, sector)
            if signature == b"EFI PART":
                return int((copy + 1) * sector)
    return 0


def _by_mbr(head: bytes) -> int:
    """A boot sector without partitions has code where the table would be: what cannot be one says nothing."""
    if head[510:512] != b"\x55\xaa":
        return 0
    entries = [MBR.unpack_from(head, 446 + 16 * number) for number in range(4)]
    used = [(start, sectors) for _, kind, start, sectors in entries if kind not in (0, PROTECTIVE)]
    if any(status not in (0, 0x80) for status, *_ in entries) or any(0 in span for span in used):
        return 0
    return max((start + sectors for start, sectors in used), default=0) * SECTORS[0]
