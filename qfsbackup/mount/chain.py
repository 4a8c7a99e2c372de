# SPDX-License-Identifier: LGPL-2.1-or-later
"""One target's chain of backups during one mount: what the last commit stored, what this mount shows, the next commit.

    store --bases--> source: bitmaps at the instant --dirty maps--> grids: the times that the tree shows
      ^                                                                                       |
      '--- commit: 1. generation and times, durable   2. QEMU drops the bases  <--------------'

Whatever dies between the two steps, the next mount finds the generation that the store names. The store is asked in
threads, for its folder may hang: then nothing more is asked of it, and nothing is committed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import trio

from qfsbackup.contracts import Disk, Snapshot
from qfsbackup.errors import EXIT_SYSTEM, UserError
from qfsbackup.facts import CheckpointRequest, Known
from qfsbackup.fs.grid import Grid, cut
from qfsbackup.mount.checking import check
from qfsbackup.patience import NoAnswerError, Patience, in_time
from qfsbackup.ranges import RangeSet
from qfsbackup.state.store import DiskState, Store, committed_generations, new_generation, open_store
from qfsbackup.status import Status

log = logging.getLogger(__name__)

STORE_TIMEOUT = 60.0  # seconds for one call; fsync(2) waits for all that is to be written before it
ANSWER_TIMEOUT = 60.0  # seconds for every disk to answer before a commit
CLOSE_TIMEOUT = 5.0  # seconds, also for a commit in the middle of which the mount is ended

T = TypeVar("T")


class Numbers(NamedTuple):
    """What inodes are made of: the same for ever."""

    vm: int
    disks: Mapping[str, int]  # by the disk's name


class Chain:
    """The chain of `target`. Only `open_chain` makes one."""

    def __init__(self, target: str, folder: Path, chunk: int | None, *, in_image: bool) -> None:
        self._target = target
        self._folder = folder
        self._in_image = in_image
        self._chunk = chunk
        self._stack = ExitStack()
        self._store: Store | None = None
        self._patience = Patience(STORE_TIMEOUT, CLOSE_TIMEOUT)
        self._id = ""  # the store's
        self._generations: dict[str, str] = {}
        self._next: dict[str, DiskState] = {}
        self.base_instants: dict[str, int] = {}  # of what was committed last, once the grids are there
        self._committing = trio.Lock()
        self.committed = False

    @property
    def request(self) -> CheckpointRequest:
        """What the source is asked for."""
        return CheckpointRequest(self._target, self._known, self._in_image)

    def _generation(self, disk: str) -> str:
        """Each disk has one of its own, so that its bitmap is found on no other disk, whatever the disks are called."""
        return self._generations.setdefault(disk, new_generation(self._id))

    async def _known(self, uuid: str | None, name: str) -> Known:
        self._store = store = await self._ask(partial(self._open, uuid, name))
        self._id = await self._ask(store.id)
        generations, bases = await self._ask(store.generations), await self._ask(partial(store.bases, self._target))
        return Known(self._id, generations, bases, self._generation)

    def _open(self, uuid: str | None, name: str) -> Store:
        store = self._stack.enter_context(open_store(self._folder, uuid, name))
        self._stack.enter_context(store.lock(self._target))
        return store

    async def _ask(self, call: Callable[[], T], *, grace: float = 0.0) -> T:
        """What a call of the store returns. Raises UserError, also where it does not answer."""
        try:
            return await self._patience.ask(call, grace=grace)
        except NoAnswerError:
            raise _silence(self._folder) from None

    async def close(self) -> None:
        """Let the store go."""
        await self._patience.let_go(self._stack.close)

    @property
    def _opened(self) -> Store:
        if self._store is None:
            raise LookupError("the source has not asked for the bases")
        return self._store

    async def begin(self, snapshot: Snapshot) -> int:
        """The time of what has changed in this mount, in nanoseconds; stored before anybody can see it."""
        shown = await self._ask(partial(self._opened.begin, self._target, snapshot.instant))
        self._stack.callback(self._end, time.time_ns(), _ticks())
        return shown

    def _end(self, began: int, ticks: int) -> None:
        """Store when this mount ended, whatever ended it. `began` and `ticks` are what both clocks said at first.

        The clock may have been set back since, and a tool may have started before that.
        """
        try:
            self._opened.end(self._target, max(time.time_ns(), began + _ticks() - ticks))
        except UserError as error:
            log.warning("%s: the next backup's times are later than they need be", error.what)

    async def numbers(self, snapshot: Snapshot) -> Numbers:
        """The numbers of the VM and its disks."""
        store, disks = self._opened, [disk.name for disk in snapshot.disks]
        return await self._ask(lambda: Numbers(store.vm_number(), {name: store.disk_number(name) for name in disks}))

    async def grids(self, snapshot: Snapshot, shown: int, disks: Sequence[Disk]) -> dict[str, Grid]:
        """How each disk is cut, and when its chunks changed; noted for the commit.

        What was shown as changed and not committed is shown as changed again, also where it is as it was then.
        """
        last = await self._ask(partial(self._opened.disks, self._target))
        uncommitted = await self._ask(partial(self._opened.uncommitted, self._target))
        self.base_instants = {name: disk.instant for name, disk in last.items()}
        grids = {}
        for found, disk in zip(snapshot.disks, disks, strict=True):
            old = last.get(found.name)  # also where all is dirty: the chunk size stays
            base = Grid(old.size, old.chunk, old.times) if old else None
            grid = cut(found.size, disk.dirty | uncommitted.get(found.name, RangeSet()), shown, base, self._chunk)
            grids[found.name] = grid
            uncommitted[found.name] = grid.changed(shown)
            if found.generation:
                self._next[found.name] = DiskState(
                    found.generation, snapshot.instant, found.size, found.content, grid.chunk, grid.times
                )
        await self._ask(partial(self._opened.show_uncommitted, self._target, uncommitted))
        return grids

    async def commit(self, snapshot: Snapshot, disks: Sequence[Disk], status: Status) -> None:
        """This mount's generations are the next bases; once more does nothing. Raises UserError.

        A broken snapshot is never committed: every disk has to answer once more.
        """
        async with self._committing:
            if self.committed:
                return
            await _check_whole(disks, status)
            await self._ask(partial(self._opened.commit, self._target, self._next), grace=CLOSE_TIMEOUT)
            self.committed = True
            if snapshot.keep:
                with trio.CancelScope(shield=True):  # the store names the new bitmaps: they have to stay
                    await snapshot.keep()
            named = ", ".join(f"{name} {disk.generation}" for name, disk in self._next.items())
            log.info("committed to target %s: %s", self._target, named)


async def _check_whole(disks: Sequence[Disk], status: Status) -> None:
    answered = await check(status, disks, ANSWER_TIMEOUT)
    if status.health.broken or not answered:
        reason = f"the snapshot is broken: {status.health.broken}" if status.health.broken else "not every disk answers"
        raise UserError(f"not committed: {reason}", "Take the backup once more.", EXIT_SYSTEM)


def _ticks() -> int:
    """Nanoseconds that nobody sets back, sleep included."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def _silence(folder: Path) -> UserError:
    return UserError(
        f"the state folder {folder} does not answer",
        "See whether its file system hangs, or name another: -o state=DIR",
        EXIT_SYSTEM,
    )


async def generations(folder: Path, name: str) -> Collection[str]:
    """All generations that are committed of the VMs of this name. Raises UserError."""
    try:
        return await in_time(partial(committed_generations, folder, name), STORE_TIMEOUT)
    except NoAnswerError:
        raise _silence(folder) from None


@asynccontextmanager
async def open_chain(target: str, folder: Path, chunk: int | None, *, in_image: bool) -> AsyncIterator[Chain]:
    """The chain of `target`, kept in `folder`; `chunk` is the chunk size that was asked for, `in_image` says whether
    bitmaps may be stored in the disks' images. Raises UserError.
    """
    chain = Chain(target, folder, chunk, in_image=in_image)
    try:
        yield chain
    finally:
        await chain.close()
