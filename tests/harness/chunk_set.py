# SPDX-License-Identifier: LGPL-2.1-or-later
"""A folder of chunks, as a backup tool restores it."""

from __future__ import annotations

import json
import os
import random
from array import array
from pathlib import Path

from qfsbackup.backup.chunk_times import SECOND, pack
from qfsbackup.backup.names import chunk_path

KIB = 1024
CHUNK = 64 * KIB


def make_content(size: int, data: list[tuple[int, int]]) -> bytes:
    """Zeros, but for noise in the ranges."""
    content, noise = bytearray(size), random.Random(size)
    for start, end in data:
        content[start:end] = noise.randbytes(len(content[start:end]))
    return bytes(content)


def cut(folder: Path, content: bytes, chunk: int = CHUNK) -> Path:
    """`content` as chunks below `folder`, zeros as holes, as restic restores them with --sparse. Returns `folder`."""
    folder.mkdir(parents=True)
    for number, start in enumerate(range(0, len(content), chunk)):
        path = folder / chunk_path(number)
        path.parent.mkdir(exist_ok=True)
        piece = content[start : start + chunk]
        with path.open("wb") as file:
            if any(piece):
                file.write(piece)
            file.truncate(len(piece))
    return folder


def describe(
    top: Path, *, name: str = "vda", size: int, chunk: int = CHUNK, times: list[int] | None = None, mtime: int = 0
) -> None:
    """A vm.json in `top`. `times` of each chunk and its own `mtime` are in seconds; without, it is an old one."""
    disk: dict[str, object] = {"name": name, "size": size, "chunk_size": chunk}
    if times is not None:
        disk["chunk_times"] = pack(array("q", [second * SECOND for second in times]))
    (top / "vm.json").write_text(json.dumps({"format": 1, "mtime": mtime, "disks": [disk]}))
    os.utime(top / "vm.json", (mtime, mtime))
