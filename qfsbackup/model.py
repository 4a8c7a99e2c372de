# SPDX-License-Identifier: LGPL-2.1-or-later
"""The facts that the pillars hand to each other, and the two seams with more than one real side.

    sources/  --Snapshot-->  daemon  --Export-->  nbd/  --Disk-->  fs/

Sizes and offsets are bytes. Times are integers: nanoseconds since the epoch, UTC.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from qfsbackup.ranges import RangeSet
from qfsbackup.seen import Seen

BitmapStatus = Literal["none", "new", "reuse", "invalid"]

Buffer = bytes | bytearray | memoryview
Answer = Callable[[Buffer | None], None]
"""Takes what was read, or None where it did not come."""

ShortRead = Callable[[Callable[[Any, Buffer | None], None], Any, int, int], bool]
"""read(answer, token, start, length): was it taken? If so, `answer(token, content)` is called once, None as above."""

Sockets = dict[int, Callable[[], None]]
"""Descriptor -> what to call when it is readable, for whoever waits for the kernel and for a server at once. Calling it
without need does no harm, and nobody has to: the event loop does it too, a little later."""

CONNECTIONS = 96  # to all exports together, if there are so many connections; QEMU from 7.2.14 on takes 100

CLUSTER = 64 * 1024  # QEMU's copy-before-write unit over a raw fleecing file (block/copy-before-write.c)


@dataclass(frozen=True, slots=True)
class Export:
    """One disk of a snapshot, as an NBD server offers it."""

    disk: str  # the disk's name as a person sees it; unique in its snapshot; any characters
    uri: str  # where libnbd connects to, export name included
    size: int
    dirty_context: str | None  # NBD meta context that marks dirty extents; None: everything is dirty
    can_trim: bool  # may what nobody reads any more be given back: only what is ours, or was said to be free to go
    request_unit: int | None = None  # no read may cross a multiple of this: it could return what was written since
    copied: Callable[[], RangeSet] | None = None  # data that may be reported as zero: look after asking, in a thread
    allocation: bool = True  # may the server be asked what is zero
    low_water: int | None = None  # from here on all is dirty, whatever the context says: the disk was resized
    bitmap: BitmapStatus = "none"
    bitmap_reason: str = ""  # why, where the status is `new` or `invalid`
    generation: str | None = None  # what the disk's new bitmap starts; None: no target, or nothing of it is recorded
    base: str | None = None  # the generation that the dirty extents start from; None: everything is dirty
    transient: str = ""  # why the new bitmap ends with QEMU; empty: the image holds it, or there is none
    content: str = ""  # what the source calls the disk's content; another one makes the next backup a full one
    details: Mapping[str, object] = field(default_factory=dict)  # what vm.json adds to the disk's entry


@dataclass(frozen=True, slots=True)
class Base:
    """What a disk was when a target was last committed: where its next incremental backup starts."""

    generation: str  # names the bitmap that has recorded since: `qfsbackup-<target>-<generation>`
    size: int  # of the disk at that time
    content: str = ""  # as Export has it


@dataclass(frozen=True, slots=True)
class Known:
    """What the state store knows of a target of a VM."""

    store: str  # the store's id: what its generations begin with
    committed: Collection[str]  # all generations that it names, of this and of other targets
    bases: Mapping[str, Base]  # disk's name -> its base
    generation: Callable[[str], str]  # disk's name -> its new generation: no other disk or mount ever has the same


@dataclass(frozen=True, slots=True)
class CheckpointRequest:
    """Asks a source to start a new generation of each disk of `target` at the snapshot's instant."""

    target: str
    known: Callable[[str | None, str], Awaitable[Known]]  # (uuid, VM's name) -> what is known of the target
    in_image: bool = True  # may the new bitmaps be stored in the disks' images


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One frozen instant of a VM."""

    vm: str
    uuid: str | None
    instant: int
    exports: tuple[Export, ...]
    frozen: bool = False  # were the guest's file systems frozen by its agent
    pause_ms: float = 0.0  # how long the guest's CPUs were stopped
    details: Mapping[str, object] = field(default_factory=dict)  # what vm.json adds
    config: Mapping[str, bytes] = field(default_factory=dict)  # file name -> content, for config/
    keep: Callable[[], Awaitable[None]] | None = None
    """Commit: the new bitmaps stay and the bases go. Without it, leaving the snapshot removes the new ones."""


@dataclass(frozen=True, slots=True)
class Committed:
    """What a target holds of one disk, and what a backup now would find."""

    target: str
    disk: str
    generation: str
    instant: int
    size: int
    dirty: int | None  # bytes changed since; None: not known, so the next backup is a full one
    reason: str  # why it is not known
    shifting: bool = False  # is the disk named by its place, so that another one may get the name


@dataclass(frozen=True, slots=True)
class Offer:
    """One export of an NBD server, as the server itself describes it."""

    name: str  # empty: the server's default export
    uri: str  # of this export
    size: int
    can_trim: bool
    contexts: tuple[str, ...]  # the NBD meta contexts it has


class Source(Protocol):
    """Where snapshots come from. One module a scheme in `sources/`."""

    def snapshot(self) -> AbstractAsyncContextManager[Snapshot]:
        """Take a snapshot; leaving the context gives it up and undoes all that taking it did.

        Raises UserError where it cannot be had.
        """
        ...


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
    def can_trim(self) -> bool: ...

    @property
    def seen(self) -> Seen:
        """What readers were answered. The short cut notes its part by itself; for all else whoever answers does, who
        knows whether the whole of an answer came."""
        ...

    @property
    def short_cut(self) -> ShortRead | None:
        """Reads small pieces of what is data with little ado, and refuses all else: ask `read_soon` then."""
        ...

    def end_short_cut(self) -> None:
        """It refuses everything from now on: some of the disk is not to be read any more."""
        ...

    def read_soon(self, offset: int, length: int, answer: Answer) -> bool:
        """Read without a task of its own, where that can be done: call `answer` exactly once, now or later.

        False where it cannot: `answer` is not called. In that case, and where it gets None, `read` has to be asked,
        which also says what is wrong.
        """
        ...

    async def read(self, offset: int, length: int) -> Buffer:
        """Exactly the bytes `[offset, offset + length)`, which must lie inside the disk.

        Raises FsError(EIO) where they cannot be had; the other ranges are not affected by that.
        """
        ...

    def keep_to(self, ranges: RangeSet) -> None:
        """Whoever reads in one of these ranges will want nothing behind its end: do not read ahead over it."""
        ...

    async def probe(self) -> None:
        """Ask the server for a few bytes, whatever is known of them. Raises FsError(EIO) where nothing is to be had."""
        ...

    async def trim(self, offset: int, length: int) -> None:
        """Give the whole clusters in the range back; never while a read of them is in flight. Not readable afterwards.

        Raises FsError(EIO) where the server refuses.
        """
        ...
