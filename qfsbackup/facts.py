# SPDX-License-Identifier: LGPL-2.1-or-later
"""The facts that the pillars hand to each other.

Sizes and offsets are bytes. Times are integers: nanoseconds since the epoch, UTC.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

BitmapStatus = Literal["none", "new", "reuse", "invalid"]

Sockets = dict[int, Callable[[], None]]
"""Descriptor -> what to call when it is readable, for whoever waits for the kernel and for a server at once. Calling it
without need does no harm, and nobody has to: the event loop does it too, a little later."""

CONNECTIONS = 96  # to all exports together, if there are so many connections; QEMU from 7.2.14 on takes 100

USUAL_CHUNK = 4 << 20  # bytes
MOST_CHUNKS = 65536  # of a disk: 256 folders of 256

CLUSTER = 64 * 1024  # QEMU's copy-before-write unit over a raw fleecing file (block/copy-before-write.c)


def count(size: int, chunk: int) -> int:
    """How many chunks a disk of `size` bytes has."""
    return -(-size // chunk)


def fitting(size: int, chunk: int) -> int:
    """`chunk`, doubled until a disk of `size` bytes has at most MOST_CHUNKS of them."""
    while count(size, chunk) > MOST_CHUNKS:
        chunk *= 2
    return chunk


@dataclass(frozen=True, slots=True)
class Base:
    """What a disk was when a target was last committed: where its next incremental backup starts."""

    generation: str  # names the bitmap that has recorded since: `qfsbackup-<target>-<generation>`
    size: int  # of the disk at that time
    content: str = ""  # what the source called the disk's content


@dataclass(frozen=True, slots=True)
class Known:
    """What the state store knows of a target of a VM."""

    store: str  # the store's id: what its generations begin with
    generations: Collection[str]  # all that it names, of this and of other targets
    bases: Mapping[str, Base]  # disk's name -> its base
    generation: Callable[[str], str]  # disk's name -> its new generation: no other disk or mount ever has the same


@dataclass(frozen=True, slots=True)
class CheckpointRequest:
    """Asks a source to start a new generation of each disk of `target` at the snapshot's instant."""

    target: str
    known: Callable[[str | None, str], Awaitable[Known]]  # (uuid, VM's name) -> what is known of the target
    in_image: bool = True  # may the new bitmaps be stored in the disks' images


def is_chunk_size(size: int) -> bool:
    """A power of two, from 64 KiB, which is what a dirty bitmap tells apart by default, to 1 TiB."""
    return 64 << 10 <= size <= 1 << 40 and size & (size - 1) == 0
