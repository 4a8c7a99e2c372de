# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bitmaps that no backup starts from any more: which are ours to remove, and what becomes of the others.

A generation begins with the id of the store that made it. What another store made (another `state=`, the VM that this
image was copied from) may be that store's base, and is only removed on demand. And not all can be removed: QEMU refuses
it for a read-only image, below an external snapshot or of `-snapshot`, and one that is not active. What stays is named,
and stops nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qfsbackup.vm.bitmaps.checkpoint import NAME, bitmap_name, low_name
from qfsbackup.vm.look.graph import Node, look_at_nodes
from qfsbackup.vm.monitor import Monitor, QmpRefusedError
from qfsbackup.vm.node import remove_node
from qfsbackup.vm.ours import NEW

log = logging.getLogger(__name__)
FOREIGN = "it was made with another state folder, or by another VM (checkpoints SOURCE --delete TARGET --others)"


@dataclass(frozen=True, slots=True)
class Found:
    """A bitmap of ours; `file` is what the node shows."""

    node: str
    file: str
    name: str
    target: str
    generation: str
    inconsistent: bool
    busy: bool  # in use by an export or a job; it can be removed when that ends

    @property
    def companion(self) -> bool:
        """Does it only stand beside another one, so that nobody need be told of it."""
        return self.name == low_name(bitmap_name(self.target, self.generation))

    def __str__(self) -> str:
        return f"the bitmap {self.name} of {self.file or self.node}"


@dataclass(slots=True)
class Outcome:
    """What was removed and what was left, a line each."""

    removed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def leave(self, bitmap: Found, reason: str) -> None:
        """Note that it was left."""
        if not bitmap.companion:
            self.left.append(f"{bitmap}: {reason}")

    busy: set[str] = field(default_factory=set)  # generations of those left that can be removed later


def bitmaps_of(nodes: Collection[Node]) -> Iterator[Found]:
    """All bitmaps that are named as ours are."""
    for node in nodes:
        for bitmap in node.bitmaps:
            match = NAME.fullmatch(_name(bitmap))
            if match:
                inconsistent = bool(bitmap.get("inconsistent"))
                generation, busy = match["generation"], bool(bitmap.get("busy"))
                yield Found(node.name, node.filename, match[0], match["target"], generation, inconsistent, busy)


def _name(bitmap: Mapping[str, Any]) -> str:
    return str(bitmap.get("name", ""))


async def remove_leftovers(qmp: Monitor, store: str, generations: Collection[str]) -> Outcome:
    """Remove the bitmaps that this store made, but for those of `generations`.

    Inconsistent ones go too: nothing else works with them, and while they are there the disk cannot be resized.
    """
    outcome = Outcome()
    for bitmap in bitmaps_of((await look_at_nodes(qmp)).values()):
        if not bitmap.generation.startswith(store):
            outcome.leave(bitmap, FOREIGN)
        elif bitmap.generation not in generations or bitmap.inconsistent:
            await _remove(qmp, bitmap, outcome)
    return outcome


async def remove_all(qmp: Monitor, wanted: Callable[[Found], bool]) -> Outcome:
    """Remove all bitmaps of ours that are wanted."""
    outcome = Outcome()
    for bitmap in bitmaps_of((await look_at_nodes(qmp)).values()):
        if wanted(bitmap):
            await _remove(qmp, bitmap, outcome)
    return outcome


async def _remove(qmp: Monitor, bitmap: Found, outcome: Outcome) -> None:
    try:
        await remove_bitmap(qmp, bitmap)
    except QmpRefusedError as error:
        outcome.leave(bitmap, f"QEMU does not remove it ({error.desc})")
        if bitmap.busy:
            outcome.busy.add(bitmap.generation)
    else:
        outcome.removed.append(f"removed {bitmap}")


async def remove_bitmap(qmp: Monitor, bitmap: Found) -> None:
    """Raises QmpError."""
    await qmp.execute("block-dirty-bitmap-remove", {"node": bitmap.node, "name": bitmap.name})


async def remove_marked(qmp: Monitor, generations: Callable[[], Awaitable[Collection[str]]]) -> Outcome:
    """Undo what a mount that died had begun to record: marks in QEMU say what. `generations`: all that a store names.

    What is committed stays: the mount died after it was, and before the mark was removed. The mark of what is in use
    stays, too, so that it is tried again.
    """
    marked = {name.removeprefix(NEW) for name in await look_at_nodes(qmp) if name.startswith(NEW)}
    if not marked:
        return Outcome()
    dead = marked.difference(await generations())
    outcome = await remove_all(qmp, lambda bitmap: bitmap.generation in dead)
    for generation in sorted(marked - outcome.busy):
        await remove_node(qmp, NEW + generation)
    return outcome
