# SPDX-License-Identifier: LGPL-2.1-or-later
"""The live figures of one mount: every pillar counts here, `.qfsbackup/status.json` and `qfsbackup status` show it.

Nothing here waits: what storage knows is what the last look found.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from qfsbackup.health import Health

FORMAT = 2  # of the JSON; raised when a key changes its meaning or goes away


@dataclass(slots=True)
class DiskStatus:
    """Counters of one disk; all in bytes unless the name says otherwise."""

    size: int
    data: int = 0  # what is not known to be zero
    dirty: int = 0  # changed since the base checkpoint
    bitmap: str = "none"
    bitmap_reason: str = ""
    generation: str | None = None
    base: str | None = None
    transient: str = ""
    nbd_bytes: int = 0  # read from the NBD server, readahead included
    nbd_requests: int = 0  # a count
    read_bytes: int = 0  # answered to readers, zeros included
    read_errors: int = 0  # a count
    punched: int = 0  # punched by readers
    discarded_unread: Callable[[], int] = field(default=lambda: 0)  # of what was punched: data that nobody had read
    trimmed: int = 0  # given back to the server
    fleecing_used: int = 0  # allocated in the fleecing file at the last look


@dataclass(frozen=True, slots=True)
class FleecingLook:
    """What one look at the fleecing files found; sizes in bytes."""

    used: Mapping[str, int]  # by the disk's name
    lost: Sequence[str]  # the disks of which the file system could not store all
    free: int  # left in the folder's file system


@dataclass(slots=True)
class Status:
    """Everything `status.json` shows. `facts` are fixed once the mount is ready; the rest moves."""

    facts: dict[str, object] = field(default_factory=dict)
    disks: dict[str, DiskStatus] = field(default_factory=dict)
    health: Health = field(default_factory=Health)
    vm_gone: str | None = None  # why QEMU can no longer be reached
    unrestored: str | None = None  # what QEMU still has of ours, or why that is not known; None: nothing
    fleecing_limit: int | None = None  # bytes over all disks
    look_at_fleecing: Callable[[], FleecingLook] | None = None  # may hang: see mount/checking.py
    looked: float | None = None  # when that was done last, by the monotonic clock
    fleecing_free: int = 0  # bytes left in the fleecing folder's file system
    fleecing_peak: int = 0  # the most they held at any look
    fleecing_warning: bool = False  # will there soon be no room left
    fleecing_full_in: float | None = None  # seconds, at the rate of the last minute; None: they do not grow

    def note(self, look: FleecingLook) -> None:
        """Remember it; the snapshot is broken where a fleecing file lost data after QEMU had written it."""
        self.looked = time.monotonic()
        self.fleecing_free = look.free
        for name, used in look.used.items():
            self.disks[name].fleecing_used = used
        self.fleecing_peak = max(self.fleecing_peak, self.fleecing_used)
        for name in look.lost:
            self.health.mark_broken(f"the fleecing file of {name} could not be stored: its file system had an error")

    @property
    def fleecing_used(self) -> int:
        """Bytes that all fleecing files held at the last look."""
        return sum(disk.fleecing_used for disk in self.disks.values())

    def as_dict(self) -> dict[str, object]:
        """The shape that the README documents; keys are only ever added to a `format`."""
        return {
            "format": FORMAT,
            **self.facts,
            "state": "broken" if self.health.broken else "ready",
            "broken": self.health.broken,
            "vm_gone": self.vm_gone,
            "fleecing": {
                "used": self.fleecing_used,
                "peak": self.fleecing_peak,
                "free": self.fleecing_free,
                "age_s": None if self.looked is None else round(time.monotonic() - self.looked, 3),
                "limit": self.fleecing_limit,
                "warning": self.fleecing_warning,
                "full_in_s": None if self.fleecing_full_in is None else round(self.fleecing_full_in),
            },
            "disks": {name: _disk_dict(disk) for name, disk in self.disks.items()},
        }


def _disk_dict(disk: DiskStatus) -> dict[str, object]:
    return {
        "size": disk.size,
        "data": disk.data,
        "dirty": disk.dirty,
        "bitmap": disk.bitmap,
        "bitmap_reason": disk.bitmap_reason,
        "generation": disk.generation,
        "base": disk.base,
        "bitmap_transient": disk.transient,
        "nbd_bytes": disk.nbd_bytes,
        "nbd_requests": disk.nbd_requests,
        "read_bytes": disk.read_bytes,
        "read_errors": disk.read_errors,
        "punched": disk.punched,
        "discarded_unread": disk.discarded_unread(),
        "trimmed": disk.trimmed,
        "fleecing_used": disk.fleecing_used,
    }


def discarded(unread: Mapping[str, int]) -> str:
    """What a person is told of the bytes, by disk, that were discarded before anybody read them; empty: nothing."""
    parts = [f"{size} bytes of {name}" for name, size in unread.items() if size]
    return f"{', '.join(parts)} were discarded before anybody had read them" if parts else ""
