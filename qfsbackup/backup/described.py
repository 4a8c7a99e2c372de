# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a restored vm.json says of a disk, and whether the restored chunks are that disk's, of that instant.

A tool that died half-way leaves chunks of two instants in a copy that it updates in place; somebody may put files of
two backups into one folder. Names and sizes do not tell, but times do: each mount's are its own, vm.json has that of
every chunk, and backup tools restore them, in whole seconds at least.
"""

from __future__ import annotations

import json
import logging
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qfsbackup.backup.chunk_times import SECOND, unpack
from qfsbackup.backup.names import chunk_path, file_name
from qfsbackup.errors import EXIT_SYSTEM, UserError
from qfsbackup.facts import count

log = logging.getLogger(__name__)

HINT = "Restore that folder again, as a whole, from one snapshot of the backup."
TAKE_TORN = "Or take them as they are: qfsbackup restore --torn"
NAMED = 5  # chunks that a message names
MALFORMED = (ValueError, TypeError, KeyError, ZeroDivisionError, AttributeError)


@dataclass(frozen=True, slots=True)
class Description:
    """A vm.json."""

    path: Path
    content: dict[str, Any]
    disks: Mapping[str, dict[str, Any]]  # what it says of each, by what its folder is called
    kept_time: bool  # has the file the time that the mount showed


@dataclass(frozen=True, slots=True)
class Described:
    """A disk by vm.json; sizes in bytes."""

    path: Path  # of vm.json
    size: int
    chunk: int
    times: array[int] | None  # of each chunk, in seconds since the epoch; None: an older version wrote none
    kept_time: bool  # has vm.json itself the time that the mount showed

    @property
    def chunks(self) -> int:
        """How many there are."""
        return count(self.size, self.chunk)


def description(top: Path) -> Description | None:
    """The vm.json of the backup in `top`; None where there is none. Raises UserError."""
    path = top / "vm.json"
    try:
        mtime = path.stat().st_mtime_ns // SECOND
        content = json.loads(path.read_bytes())
        disks = {file_name(disk["name"]): disk for disk in content["disks"]}
        return Description(path, content, disks, kept_time=content.get("mtime") == mtime)
    except FileNotFoundError:
        return None
    except (OSError, *MALFORMED) as error:
        raise _unreadable(path, error) from None


def described(folder: Path) -> Described | None:
    """What vm.json says of the disk whose chunks are in `folder`; None where there is none. Raises UserError."""
    found = description(folder.parent.parent)
    if found is None:
        return None
    if folder.name not in found.disks:
        what = f"{found.path} knows no disk {folder.name}, so the two are not of one snapshot"
        raise UserError(what, HINT, EXIT_SYSTEM)
    try:
        return _disk(found.path, found.disks[folder.name], kept_time=found.kept_time)
    except MALFORMED as error:
        raise _unreadable(found.path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    hint = "Restore it again, or move it away to do without."
    return UserError(f"{path} cannot be read: {error}", hint, EXIT_SYSTEM)


def _disk(path: Path, disk: dict[str, Any], *, kept_time: bool) -> Described:
    """Raises MALFORMED."""
    size, chunk, times = int(disk["size"]), int(disk["chunk_size"]), disk.get("chunk_times")
    chunks = count(size, chunk)
    return Described(path, size, chunk, unpack(times["seconds"], times["chunks"], chunks) if times else None, kept_time)


def check_together(folder: Path, times: Sequence[int], disk: Described | None, *, torn: bool) -> None:
    """Raise UserError where a chunk has another time than vm.json says; `torn`: only say it.

    `times` are those of the chunks in `folder`, in nanoseconds, as many as vm.json says. Where neither a chunk nor
    vm.json has the time that it should have, a tool that keeps no times was at work: that is said too.
    """
    if disk is None:
        log.warning(
            "no %s: whether chunks are missing at the end, and whether all are of one backup, cannot be known."
            " Let the tool restore it too",
            folder.parent.parent / "vm.json",
        )
        return
    if disk.times is None:
        log.warning("%s is of an older version: whether the chunks are of one backup cannot be known", disk.path)
        return
    both = enumerate(zip(times, disk.times, strict=True))
    strangers = [number for number, (own, said) in both if own // SECOND != said]
    if not strangers:
        return
    if len(strangers) == len(times) and not disk.kept_time:
        log.warning(
            "the files' times were not kept: whether the chunks in %s are of one backup cannot be known", folder
        )
        return
    names = ", ".join(map(chunk_path, strangers[:NAMED])) + (", ..." if len(strangers) > NAMED else "")
    what = f"{len(strangers)} of the {len(times)} chunks in {folder} are not of the backup in vm.json: {names}"
    if not torn:
        raise UserError(what, f"{HINT} {TAKE_TORN}", EXIT_SYSTEM)
    log.warning("%s; taken all the same", what)
