# SPDX-License-Identifier: LGPL-2.1-or-later
"""The seams with more than one real side.

find(text) --> Source --snapshot(mounting)--> Snapshot --of each SnapshotDisk, open()--> Disk --> fs/
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from qfsbackup.errors import EXIT_USAGE, FsError, UserError
from qfsbackup.facts import BitmapStatus, CheckpointRequest, Sockets
from qfsbackup.options import Options
from qfsbackup.ranges import RangeSet
from qfsbackup.status import Status

FROZEN_NOTE = "frozen"

Buffer = bytes | bytearray | memoryview

Answer = Callable[[Buffer | FsError], None]
"""Is called exactly once, now or later, in trio's thread, with the bytes or with why there are none. It neither waits
nor raises."""


class Disk(Protocol):
    """The bytes of one disk at the instant."""

    @property
    def size(self) -> int: ...

    @property
    def data(self) -> RangeSet:
        """What has to be read; all the rest of the disk is known to be zero."""
        ...

    @property
    def dirty(self) -> RangeSet:
        """What changed since the base checkpoint; all of the disk where there is none."""
        ...

    @property
    def can_trim(self) -> bool:
        """May what nobody reads any more be given back."""
        ...

    def read(self, start: int, length: int, answer: Answer) -> None:
        """Exactly the bytes `[start, start + length)`, of which all are `data` and none was trimmed; else FsError(EIO).

        An error of one range does not affect others.
        """
        ...

    async def trim(self, start: int, length: int) -> None:
        """From this call on nothing of exactly `[start, start + length)` is read any more.

        The whole clusters that are complete now, some of them by earlier trims beside, are given back once no read of
        them is in flight, where the disk can trim. Raises FsError(EIO) where the server refuses.
        """
        ...

    async def probe(self) -> None:
        """Ask for a few bytes, whatever is known of them. Raises FsError(EIO) where nothing is to be had."""
        ...


async def awaited(read: Callable[[int, int, Answer], None], start: int, length: int) -> Buffer:
    """What `read` answers, for whoever has a task that can wait. Raises FsError."""
    from trio import Event  # whoever has no event loop need not load one

    answers: list[Buffer | FsError] = []
    over = Event()

    def answer(content: Buffer | FsError) -> None:
        answers.append(content)
        over.set()

    read(start, length, answer)
    await over.wait()
    if isinstance(answers[0], FsError):
        raise answers[0]
    return answers[0]


@dataclass(frozen=True, slots=True)
class SnapshotDisk:
    """One disk of a snapshot: what is known of it, and how to get at its bytes."""

    name: str  # as a person sees it; unique in its snapshot; any characters
    size: int
    open: Callable[[], AbstractAsyncContextManager[Disk]]  # once; what takes time was done before
    bitmap: BitmapStatus = "none"
    bitmap_reason: str = ""  # why, where the status is `new` or `invalid`
    generation: str | None = None  # what the disk's new bitmap starts; None: no target, or nothing of it is recorded
    base: str | None = None  # the generation that the dirty extents start from; None: everything is dirty
    map_name: str = ""  # of a dirty map that starts from no generation
    transient: str = ""  # why the new bitmap ends with QEMU; empty: the image holds it, or there is none
    content: str = ""  # what the source calls the disk's content; another one makes the next backup a full one
    details: Mapping[str, object] = field(default_factory=dict)  # what vm.json adds to the disk's entry


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One frozen instant of a VM."""

    vm: str
    uuid: str | None
    instant: int
    disks: tuple[SnapshotDisk, ...]
    own: bool = False  # may what nobody reads any more be trimmed: it is ours, or was said to be free to go
    frozen: bool = False  # were the guest's file systems frozen by its agent
    pause_ms: float = 0.0  # how long the guest's CPUs were stopped
    details: Mapping[str, object] = field(default_factory=dict)  # what vm.json adds
    config: Mapping[str, bytes] = field(default_factory=dict)  # file name -> content, for config/
    keep: Callable[[], Awaitable[None]] | None = None
    """Commit: the new bitmaps stay and the bases go. Without it, leaving the snapshot removes the new ones."""


@dataclass(frozen=True, slots=True)
class Mounting:
    """What a snapshot is taken for. When the VM goes away meanwhile, `status.vm_gone` says so at once, and
    `status.unrestored` says at the end what could not be undone."""

    options: Options
    runtime: Path  # a 0700 folder of the mount's own, whose path is short enough for a socket in it
    status: Status
    sockets: Sockets = field(default_factory=dict)  # what the mount shall also wait for
    checkpoint: CheckpointRequest | None = None  # the target whose next generation this is
    generations: Callable[[str], Awaitable[Collection[str]]] | None = None  # VM's name -> all that a store names

    @property
    def frozen_note(self) -> Path:
        """A file that names the guest's agent for as long as its guest may be frozen by us."""
        return self.runtime / FROZEN_NOTE


class Source(ABC):
    """What a person names as SOURCE, made by `sources.find`; a kind adds what it can do more than nothing.

    The supervisor has one: making it, `check`, `is_there` and `thaw_unheard` import nothing heavy and start nothing.
    """

    name: str  # in /proc/mounts and for other commands: the same from every folder, and `find` finds it again
    place: str  # what its default mountpoint is called after: the same for every run of the same VM
    kind: str  # what a person is told that it is

    def check(self, options: Options) -> None:
        """Raises UserError where an option asks for what this kind does not have."""
        if options.target:
            hint = "target= needs a VM's QMP socket: leave it out here."
            raise UserError(f"{self.kind} keeps no checkpoints", hint, EXIT_USAGE)
        if options.agent or options.freeze == "require":
            hint = "agent= and freeze=require need a VM's QMP socket."
            raise UserError(f"{self.kind} has no guest to freeze", hint, EXIT_USAGE)

    def is_there(self) -> bool:
        """May something of ours be in a VM, and be undone some time. False where the VM is off."""
        return False

    @abstractmethod
    def snapshot(self, mounting: Mounting) -> AbstractAsyncContextManager[Snapshot]:
        """Take a snapshot, and find out all of its disks; leaving the context undoes all that taking it did.

        Raises UserError where it cannot be had.
        """

    async def clean_up(self, options: Options) -> list[str]:
        """Undo what a dead mount left; safe to repeat. What was undone, a line each. Raises UserError.

        Of bitmaps only those go that the state store made, or that a dead mount's marks name, and that are not
        committed.
        """
        return []

    async def checkpoints(self, options: Options) -> list[str]:
        """What each target has committed, a line for each of its disks. Raises UserError."""
        hint = "Name a VM's QMP socket, or the image of a VM that is off."
        raise UserError(f"{self.kind} keeps no checkpoints", hint, EXIT_USAGE)

    async def forget(self, options: Options, target: str, *, others: bool) -> list[str]:
        """Delete a target's checkpoints, and its bitmaps. What was removed, a line each. Raises UserError.

        `others`: also the bitmaps of a target of this name that another store or another VM made.
        """
        return await self.checkpoints(options)

    def thaw_unheard(self, agent: str) -> None:  # noqa: B027  # most kinds have no guest
        """Have the guest thaw, at once and without asking anything first. `agent` is what a mount's note calls it."""

    async def thaw(self, agent: str) -> bool:
        """Thaw what a mount that died left frozen; was there anything? Raises UserError where nobody can tell."""
        return False
