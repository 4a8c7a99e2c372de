# SPDX-License-Identifier: LGPL-2.1-or-later
"""One target's chain of backups during one mount: what the last commit stored, what this mount shows, the next commit.

    store --bases--> source: bitmaps at the instant --dirty maps--> grids: the times that the tree shows
      ^                                                                                       |
      '--- commit: 1. generation and times, durable   2. QEMU drops the bases  <--------------'

Whatever dies between the two steps, the next mount finds the generation that the store names.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import trio

from qfsbackup.errors import EXIT_SYSTEM, FsError, UserError
from qfsbackup.fs.grid import Grid, plan
from qfsbackup.model import Base, CheckpointRequest, Disk, Snapshot
from qfsbackup.state.store import DiskState, Store, open_store
from qfsbackup.status import Status

log = logging.getLogger(__name__)


class Chain:
    """The chain of `target`. Only `open_chain` makes one."""

    def __init__(self, target: str, folder: Path, chunk: int | None, stack: ExitStack) -> None:
        self._target = target
        self._folder = folder
        self._chunk = chunk
        self._stack = stack
        self._store: Store | None = None
        self._generations: dict[str, str] = {}
        self._next: dict[str, DiskState] = {}
        self._committing = trio.Lock()
        self.committed = False

    @property
    def request(self) -> CheckpointRequest:
        """What the source is asked for."""
        return CheckpointRequest(self._target, self._generation, self._bases)

    def _generation(self, disk: str) -> str:
        """Each disk has one of its own, so that its bitmap is found on no other disk, whatever the disks are called."""
        return self._generations.setdefault(disk, secrets.token_hex(8))

    def _bases(self, uuid: str | None, name: str) -> Mapping[str, Base]:
        self._store = self._stack.enter_context(open_store(self._folder, uuid, name))
        self._stack.enter_context(self._store.lock(self._target))
        return self._store.bases(self._target)

    @property
    def store(self) -> Store:
        """The VM's state, once the source has said which VM it is."""
        if self._store is None:
            raise LookupError("the source has not asked for the bases")
        return self._store

    def begin(self, snapshot: Snapshot) -> int:
        """The time of what has changed in this mount, in nanoseconds; stored before anybody can see it."""
        return self.store.begin(self._target, snapshot.instant)

    def grids(self, snapshot: Snapshot, time: int, disks: Sequence[Disk]) -> dict[str, Grid]:
        """How each disk is cut, and when its chunks changed; noted for the commit."""
        committed = self.store.disks(self._target)
        grids = {}
        for export, disk in zip(snapshot.exports, disks, strict=True):
            old = committed.get(export.disk)  # also where all is dirty: the chunk size stays
            base = Grid(old.size, old.chunk, old.times) if old else None
            grid = plan(export.size, disk.dirty, time, base, self._chunk)
            grids[export.disk] = grid
            if export.generation:
                self._next[export.disk] = DiskState(
                    export.generation, snapshot.instant, export.size, grid.chunk, grid.times
                )
        return grids

    async def commit(self, snapshot: Snapshot, disks: Sequence[Disk], status: Status) -> None:
        """This mount's generations are the next bases; once more does nothing. Raises UserError.

        A broken snapshot is never committed: every disk has to answer once more.
        """
        async with self._committing:
            if self.committed:
                return
            await _check_whole(disks, status)
            self.store.commit(self._target, self._next)
            self.committed = True
            if snapshot.keep:
                await snapshot.keep()
            committed = ", ".join(f"{name} {disk.generation}" for name, disk in self._next.items())
            log.info("committed to target %s: %s", self._target, committed)


async def _check_whole(disks: Sequence[Disk], status: Status) -> None:
    """QEMU tells nobody that a snapshot broke, but the next read of it fails."""
    try:
        for disk in disks:
            await disk.probe()
    except FsError as error:
        status.mark_broken(str(error))
    status.check_fleecing()
    if status.broken:
        raise UserError(
            f"not committed: the snapshot is broken: {status.broken}", "Take the backup once more.", EXIT_SYSTEM
        )


@contextmanager
def open_chain(target: str, folder: Path, chunk: int | None) -> Iterator[Chain]:
    """The chain of `target`, kept in `folder`; `chunk` is the chunk size that was asked for. Raises UserError."""
    with ExitStack() as stack:
        yield Chain(target, folder, chunk, stack)
