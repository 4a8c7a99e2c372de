# SPDX-License-Identifier: LGPL-2.1-or-later
"""The facts that the pillars hand to each other.

Sizes and offsets are bytes. Times are integers: nanoseconds since the epoch, UTC.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from qfsbackup.ranges import RangeSet

BitmapStatus = Literal["none", "new", "reuse", "invalid"]

Sockets = dict[int, Callable[[], None]]
"""Descriptor -> what to call when it is readable, for whoever waits for the kernel and for a server at once. Calling it
without need does no harm, and nobody has to: the event loop does it too, a little later."""

CONNECTIONS = 96  # to all exports together, if there are so many connections; QEMU from 7.2.14 on takes 100

USUAL_CHUNK = 4 << 20  # bytes
MOST_CHUNKS = 65536  # of a disk: 256 folders of 256

CLUSTER = 64 * 1024  # QEMU's copy-before-write unit over a raw fleecing file (block/copy-before-write.c)


def fitting(size: int, chunk: int) -> int:
    """`chunk`, doubled until a disk of `size` bytes has at most MOST_CHUNKS of them."""
    while -(-size // chunk) > MOST_CHUNKS:
        chunk *= 2
    return chunk


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


def is_chunk_size(size: int) -> bool:
    """A power of two, from 64 KiB, which is what a dirty bitmap tells apart by default, to 1 TiB."""
    return 64 << 10 <= size <= 1 << 40 and size & (size - 1) == 0
