# SPDX-License-Identifier: LGPL-2.1-or-later
"""Watches the fleecing files and the snapshot that stands on them: warns in time, and tells when it is broken.

QEMU tells nobody that a fleecing write failed, and has no limit of its own. So a few bytes of every disk are read now
and then, which fails once a snapshot is broken, also where no reader would notice. Over the limit every disk is trimmed
whole: QEMU then stops copying and the space is free again, while the guest goes on.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import trio

from qfsbackup.contracts import Disk
from qfsbackup.errors import FsError
from qfsbackup.mount.checking import look_at_files
from qfsbackup.status import Status

log = logging.getLogger(__name__)

INTERVAL = 0.5  # seconds between two looks at the files
PROBE_INTERVAL = 2.0  # seconds between two reads of each disk
TREND = 60.0  # seconds that say how fast the files fill
WARN_AT = 0.8  # of what the fleecing files may hold
CALM_AT = 0.7  # a warning is over when they hold less; between the two it is not said again


async def watch_fleecing(status: Status, disks: Sequence[Disk]) -> None:
    """Runs until the snapshot is broken or it is cancelled."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_probe, disks)
        await _watch_files(status)
        nursery.cancel_scope.cancel()
    if _over_limit(status):
        await _give_back(disks)


async def _probe(disks: Sequence[Disk]) -> None:
    """A disk knows a broken snapshot from a read that fails for another reason, and says so itself."""
    while True:
        await trio.sleep(PROBE_INTERVAL)
        for disk in disks:
            with suppress(FsError):
                await disk.probe()


async def _watch_files(status: Status) -> None:
    trend = Trend()
    while True:
        await look_at_files(status)
        if _over_limit(status):
            held = status.fleecing_used
            status.health.mark_broken(
                f"the fleecing files hold {held} bytes, over fleece-limit={status.fleecing_limit}"
            )
        if status.health.broken:
            return
        trend.add(trio.current_time(), status.fleecing_used)
        _warn(status, status.fleecing_used, trend)
        await trio.sleep(INTERVAL)


def _over_limit(status: Status) -> bool:
    return status.fleecing_limit is not None and status.fleecing_used > status.fleecing_limit


def _warn(status: Status, used: int, trend: Trend) -> None:
    """Note in `status` when they will be full, and say it once where that is near."""
    room = used + status.fleecing_free
    limit = room if status.fleecing_limit is None else min(status.fleecing_limit, room)
    status.fleecing_full_in = (limit - used) / trend.rate if trend.rate else None
    near = used > limit * (CALM_AT if status.fleecing_warning else WARN_AT)
    if near and not status.fleecing_warning:
        when = "never" if status.fleecing_full_in is None else f"in {status.fleecing_full_in:.0f} s"
        log.warning("the fleecing files hold %d of %d bytes; at this rate they are full %s", used, limit, when)
    status.fleecing_warning = near


class Trend:
    """How fast the fleecing files fill, over the last minute."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def add(self, now: float, used: int) -> None:
        """They hold `used` bytes at the time `now`, in seconds."""
        self._samples.append((now, used))
        while self._samples[0][0] < now - TREND:
            self._samples.popleft()

    @property
    def rate(self) -> float:
        """Bytes a second; 0 where they do not grow."""
        (start, before), (end, after) = self._samples[0], self._samples[-1]
        return max(after - before, 0) / (end - start) if end > start else 0.0


async def _give_back(disks: Sequence[Disk]) -> None:
    for disk in disks:
        if disk.can_trim and disk.size:
            try:
                await disk.trim(0, disk.size)
            except FsError as error:
                log.warning("cannot give the fleecing space back: %s", error)
