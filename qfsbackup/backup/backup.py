# SPDX-License-Identifier: LGPL-2.1-or-later
"""A backup as a folder: restored, mounted by the tool that made it, or a copy.

    <folder>/vm.json  config/*  chunks/<disk>/NNN/NNNNNNNN

Everything here blocks, and a folder that a tool has mounted may be slow or hang: it is for a thread.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from qfsbackup.backup.chunk_set import ChunkSet, check_one_backup, find_chunks
from qfsbackup.backup.described import HINT, Description, description
from qfsbackup.backup.holes import data_of
from qfsbackup.errors import EXIT_SYSTEM, EXIT_USAGE, UserError
from qfsbackup.ranges import RangeSet

log = logging.getLogger(__name__)

LARGEST_CONFIG = 64 << 20  # bytes of a file in config/; firmware variables have less than one MiB
EPOCH = datetime.fromtimestamp(0, UTC)


@dataclass(frozen=True, slots=True)
class Backup:
    """One backup of a VM, all of whose chosen disks are complete."""

    vm: str
    uuid: str | None
    instant: int  # in nanoseconds since the epoch
    disks: Mapping[str, ChunkSet]  # by the disk's name
    data: Mapping[str, RangeSet]  # what of each is not known to be zero
    facts: Mapping[str, Any]  # all of vm.json; empty where there is none
    config: Mapping[str, bytes]  # what is in config/, and vm.json


def find_backup(path: Path, only: Sequence[str] = (), exclude: Sequence[str] = ()) -> Backup:
    """The backup at `path`: its folder, the chunks/ in it, or a disk's folder there, which then is the only disk.

    `only` these disks, all but those to `exclude`. A link is followed now: it may lead to a newer backup later. Raises
    UserError where there is none, or not all of it.
    """
    try:
        path = path.resolve(strict=True)
        top, named = _place(path)
        found = description(top)
        names = {folder: _name(folder, found) for folder in named or _folders(top)}
        known = names if named or not found else {key: disk["name"] for key, disk in found.disks.items()} | names
        chosen = _choose(list(known.values()), only, exclude)
        disks = {name: _complete(top / "chunks" / folder) for folder, name in known.items() if name in chosen}
        return _backup(path, top, found, disks)
    except OSError as error:
        hint = "Name the folder of a backup, in which chunks/ is. Is what it is in mounted?"
        raise UserError(f"cannot read {error.filename or path}: {error.strerror}", hint) from None


def _place(path: Path) -> tuple[Path, list[str]]:
    """The backup's folder, and which disk of it is meant; none: all."""
    if (path / "chunks").is_dir():
        return path, []
    if path.name == "chunks":
        return path.parent, []
    if path.parent.name == "chunks":
        return path.parent.parent, [path.name]
    what = f"there is no backup in {path}: it has no folder chunks"
    raise UserError(what, "Name the folder in which chunks/ is, as a backup tool restored or mounted it.")


def _folders(top: Path) -> list[str]:
    names = sorted(entry.name for entry in (top / "chunks").iterdir())
    if not names:
        raise UserError(f"{top / 'chunks'} has no disks in it", HINT, EXIT_SYSTEM)
    return names


def _name(folder: str, found: Description | None) -> str:
    """What the disk is called whose folder this is."""
    disk = found.disks.get(folder) if found else None
    return str(disk["name"]) if disk else unquote(folder)


def _choose(known: Sequence[str], only: Sequence[str], exclude: Sequence[str]) -> set[str]:
    disks = f"Its disks are: {', '.join(known)}."
    for name in (*only, *exclude):
        if name not in known:
            raise UserError(f"the backup has no disk {name}", disks, EXIT_USAGE)
    chosen = set(only or known) - set(exclude)
    if not chosen:
        raise UserError("every disk of the backup is excluded", disks, EXIT_USAGE)
    return chosen


def _complete(folder: Path) -> ChunkSet:
    if not folder.exists():
        hint = f"{HINT} Or leave the disk out: -o exclude=NAME"
        raise UserError(f"{folder} is missing, and vm.json names its disk", hint, EXIT_SYSTEM)
    chunks = find_chunks(folder)
    check_one_backup(chunks)
    return chunks


def _backup(path: Path, top: Path, found: Description | None, disks: Mapping[str, ChunkSet]) -> Backup:
    facts = found.content if found else {}
    newest = max((time for chunks in disks.values() for time in chunks.times), default=0)
    return Backup(
        vm=str(facts.get("vm") or top.name or path.name),
        uuid=str(facts["uuid"]) if facts.get("uuid") else None,
        instant=_instant(facts.get("instant")) or newest or path.stat().st_mtime_ns,
        disks=disks,
        data={name: data_of(chunks) for name, chunks in disks.items()},
        facts=facts,
        config=_config(top),
    )


def _instant(text: object) -> int | None:
    """The inverse of description.iso_time."""
    try:
        return (datetime.fromisoformat(str(text)) - EPOCH) // timedelta(microseconds=1) * 1000
    except (ValueError, TypeError):
        return None


def _config(top: Path) -> dict[str, bytes]:
    folder, found = top / "config", {}
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in (*paths, top / "vm.json"):
        if path.is_file() and path.stat().st_size <= LARGEST_CONFIG:
            found[unquote(path.name)] = path.read_bytes()
        elif path in paths:
            log.warning("%s is no file, or a very large one: it is left out", path)
    return found
