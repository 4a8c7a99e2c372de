# SPDX-License-Identifier: LGPL-2.1-or-later
"""A disk's chunks as a backup tool restored them: are they all there.

What the names and sizes tell is always checked. A vm.json two folders up, where the mount has it too, says what the
disk must be; without it a set that ends too early, at a whole chunk, cannot be told from a smaller disk.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from qfsbackup.backup.described import HINT, Described, check_together, described
from qfsbackup.backup.names import chunk_path
from qfsbackup.backup.partitions import check_end
from qfsbackup.backup.threads import each
from qfsbackup.errors import EXIT_SYSTEM, UserError
from qfsbackup.facts import is_chunk_size


@dataclass(frozen=True, slots=True)
class ChunkSet:
    """The complete chunks of one disk, in the order of the disk; sizes in bytes."""

    folder: Path
    chunk: int  # size of each but the last
    size: int  # of the disk
    times: Sequence[int]  # of each, in nanoseconds since the epoch
    sparse: Sequence[int]  # the numbers of those that take up less than they are long
    described: Described | None  # what vm.json says, if it is there

    @property
    def chunks(self) -> int:
        """How many there are."""
        return len(self.times)

    def paths(self) -> Iterator[Path]:
        """Each chunk's file."""
        return (self.folder / chunk_path(number) for number in range(self.chunks))


def find_chunks(folder: Path) -> ChunkSet:
    """The set below `folder`, which is chunks/<disk>. Raises UserError where it is not complete or not one set."""
    folder = folder.absolute()
    found = _files(folder)
    expected = [chunk_path(number) for number in range(len(found))]
    _check_names(folder, set(found), expected)
    sizes = [found[path].st_size for path in expected]
    _check_sizes(folder, expected, sizes)
    times = [found[path].st_mtime_ns for path in expected]
    sparse = [number for number, path in enumerate(expected) if found[path].st_blocks * 512 < found[path].st_size]
    result = ChunkSet(folder, sizes[0] if sizes else 0, sum(sizes), times, sparse, described(folder))
    if result.described:
        _check_description(result, result.described)
    elif not sizes:
        raise _refused(f"{folder} has no chunks in it")
    return result


def check_one_backup(chunks: ChunkSet, *, torn: bool = False) -> None:
    """Raise UserError where they are not of one backup, or not all of it; `torn`: only say it."""
    check_together(chunks.folder, chunks.times, chunks.described, torn=torn)
    if not chunks.described:
        check_end(chunks.folder / chunk_path(0), chunks.size, torn=torn)


def _files(folder: Path) -> dict[str, os.stat_result]:
    """Every file, by its path below `folder`."""
    try:
        return dict(chain.from_iterable(each(partial(_part, folder), list(folder.iterdir()))))
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}", _hint(error), EXIT_SYSTEM) from None


def _part(folder: Path, part: Path) -> list[tuple[str, os.stat_result]]:
    """Those of one folder of chunks. Raises UserError, OSError."""
    if not part.is_dir() or part.is_symlink():
        raise _no_chunks(folder, part)
    found = []
    for path in part.iterdir():
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode):
            raise _above(folder)
        if not stat.S_ISREG(status.st_mode):
            raise _refused(f"{path} is not a file")
        found.append((f"{part.name}/{path.name}", status))
    return found


def _hint(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "Name the folder chunks/<disk> of what was restored."
    if error.errno == errno.ENOTDIR:
        return "Name the folder chunks/<disk> of what was restored; an image is whole already, and can be copied."
    if error.errno == errno.EACCES:
        return "Run as root, or as somebody who may read all of it."
    return HINT


def _no_chunks(folder: Path, strange: Path) -> UserError:
    """`strange` stands where only folders may be: is `folder` a part of a disk, the folder above chunks/?"""
    if _is_chunk(f"{folder.name}/{strange.name}"):
        return UserError(f"{folder} is only a part of a disk", f"Name all of it: {folder.parent}", EXIT_SYSTEM)
    return _above(folder) if (folder / "chunks").is_dir() else _refused(f"{strange} is not a folder of chunks")


def _above(folder: Path) -> UserError:
    """The disks are one folder further down, or two."""
    below = folder / "chunks" if (folder / "chunks").is_dir() else folder
    names = sorted(path.name for path in below.iterdir() if path.is_dir())
    return UserError(
        f"{folder} holds the disks {', '.join(names)}", f"Name one of them: {below / names[0]}", EXIT_SYSTEM
    )


def _check_names(folder: Path, found: set[str], expected: list[str]) -> None:
    missing = next((path for path in expected if path not in found), None)
    if missing is None:
        return
    strange = min(found - set(expected))
    if any(path > missing for path in found if _is_chunk(path)):
        raise _refused(f"{folder} is not complete: {missing} is missing")
    raise _refused(f"{folder / strange} is not a chunk")


def _is_chunk(path: str) -> bool:
    name = path.rpartition("/")[2]
    return name.isascii() and name.isdecimal() and chunk_path(int(name)) == path


def _check_sizes(folder: Path, paths: list[str], sizes: list[int]) -> None:
    for path, size in zip(paths[:-1], sizes[:-1], strict=True):
        if size != sizes[0] or not is_chunk_size(size):
            raise _refused(f"{folder / path} has {size} bytes, which no chunk of this disk can have")
    if sizes and not 0 < sizes[-1] <= (sizes[0] if len(sizes) > 1 else sizes[-1]):
        raise _refused(f"{folder / paths[-1]} has {sizes[-1]} bytes, the chunks before it {sizes[0]}")


def _check_description(chunks: ChunkSet, disk: Described) -> None:
    if (chunks.size, chunks.chunks) != (disk.size, disk.chunks) or (disk.chunks > 1 and chunks.chunk != disk.chunk):
        raise _refused(
            f"{chunks.folder} holds {chunks.chunks} chunks, {chunks.size} bytes; "
            f"by vm.json they are {disk.chunks} of {disk.chunk} bytes, {disk.size} bytes in all"
        )


def _refused(what: str) -> UserError:
    return UserError(what, HINT, EXIT_SYSTEM)
