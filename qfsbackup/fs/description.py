# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a mount says of itself: vm.json, and maps/<disk>.base.

vm.json holds what is needed to see later whether chunks belong together: which backup of which target it is, what it is
based on, and the time of every chunk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from qfsbackup.backup import chunk_times
from qfsbackup.backup.names import file_name
from qfsbackup.contracts import Snapshot, SnapshotDisk
from qfsbackup.fs.control import Words
from qfsbackup.fs.grid import Grid

SECOND = 10**9  # nanoseconds


@dataclass(frozen=True, slots=True)
class Look:
    """What of a snapshot is shown, and how; times in nanoseconds since the epoch."""

    time: int  # of what is this mount's own
    newest: int  # of vm.json: no file is newer, for borg never remembers the newest
    number: int | None = None  # the VM's, like a disk's: part of the inodes of what belongs to no disk
    images: bool = True  # can all of a disk be read
    release: bool = False  # give chunks back once they were read
    target: str | None = None
    base_instants: Mapping[str, int] = field(default_factory=dict)  # by the disk's name, where there is a base
    words: Words = field(default_factory=dict)  # that the control file takes; none: there is no such file


def describe(snapshot: Snapshot, grids: Mapping[str, Grid], look: Look) -> bytes:
    """vm.json: what this mount shows. Fixed for the life of the mount. `grids` by the disk's name.

    `mtime` is the file's own time, in seconds: where it was not kept, the times of the chunks were not either.
    """
    description = {
        "format": 1,
        "vm": snapshot.vm,
        "uuid": snapshot.uuid,
        "instant": iso_time(snapshot.instant),
        "mtime": look.newest // SECOND,
        "target": look.target,
        "frozen": snapshot.frozen,
        "pause_ms": snapshot.pause_ms,
        **snapshot.details,
        "disks": [_describe(disk, grids[disk.name], look) for disk in snapshot.disks],
    }
    return (json.dumps(description, indent=2) + "\n").encode()


def _describe(disk: SnapshotDisk, grid: Grid, look: Look) -> dict[str, object]:
    name = file_name(disk.name)
    return {
        "name": disk.name,
        **({"image": f"images/{name}.raw"} if look.images else {}),
        "chunks": f"chunks/{name}",
        "chunk_size": grid.chunk,
        "size": disk.size,
        "bitmap": disk.bitmap,
        "bitmap_reason": disk.bitmap_reason,
        "generation": disk.generation,
        "base": disk.base,
        "base_instant": _base_instant(disk, look),
        "bitmap_transient": disk.transient,
        **disk.details,
        "chunk_times": chunk_times.pack(grid.times),
    }


def _base_instant(disk: SnapshotDisk, look: Look) -> str | None:
    return iso_time(look.base_instants[disk.name]) if disk.base else None


def describe_base(snapshot: Snapshot, disk: SnapshotDisk, look: Look) -> bytes:
    """maps/<disk>.base: to which backup the maps and the delta must be applied to become which one."""
    facts = {
        "disk": file_name(disk.name),
        "target": file_name(look.target or "none"),
        "generation": disk.generation or "none",
        "instant": iso_time(snapshot.instant),
        "base": disk.base or disk.map_name or "none",
        "base_instant": _base_instant(disk, look) or "none",
    }
    return "".join(f"{name} {value}\n" for name, value in facts.items()).encode()


def iso_time(instant: int) -> str:
    """Nanoseconds since the epoch as ISO 8601 has it, in UTC, to the microsecond."""
    whole, rest = divmod(instant, 10**9)
    return f"{datetime.fromtimestamp(whole, UTC):%Y-%m-%dT%H:%M:%S}.{rest // 1000:06}Z"
