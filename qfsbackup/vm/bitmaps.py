# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checkpoints in QEMU: dirty bitmaps on the nodes that the guest writes to, two for each target during a backup.

    ---- base records ----------------------------------+------------------------> removed by keep()
                                 instant: new is added  |---- new records -------> removed by leaving, without keep()
                                 base copied to the map '--> exported, on a node of ours

Bitmap `qfsbackup-<target>-<generation>` holds every write since that generation's instant, whatever dies meanwhile.
Beside it, `...-<generation>.low` tells what was cut off since (see low_water). Which generation counts is for the state
store to say; a bitmap of this target that it does not name is a leftover. The map is a copy on our own node, because a
resize of the guest's disk aborts QEMU while a bitmap of its node is exported.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from qfsbackup.model import CLUSTER, Base, BitmapStatus
from qfsbackup.vm.graph import Disk, Node, look_at_nodes
from qfsbackup.vm.low_water import add_all_set, low_water, marking
from qfsbackup.vm.node import undoing
from qfsbackup.vm.owner import PREFIX
from qfsbackup.vm.qmp import Qmp, QmpRefusedError

log = logging.getLogger(__name__)

MAP = f"{PREFIX}map"
GRANULARITY = CLUSTER  # bytes; finer ones cost memory and save nothing, for copy-before-write has this unit too
GENERATION = r"[0-9a-f]{16}"
PERSISTENT = frozenset(["qcow2"])  # raw: "Can't store persistent bitmaps" (QEMU 7.2, 10.0)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Which generation a disk's backup starts, and from which."""

    target: str
    generation: str
    base: str | None  # the generation whose bitmap is copied into the map; None: everything is dirty
    status: BitmapStatus
    reason: str
    low_water: int = 0  # bytes: from here on the base says nothing, for the disk was cut off or has grown

    @property
    def new(self) -> str:
        """The name of the bitmap that records from now on."""
        return bitmap_name(self.target, self.generation)

    @property
    def old(self) -> str:
        """The name of the base's bitmap, where there is one."""
        return bitmap_name(self.target, self.base or "")


@dataclass(slots=True)
class Kept:
    """Whether the new bitmaps stay."""

    kept: bool = field(default=False)


def bitmap_name(target: str, generation: str) -> str:
    """The name of the bitmap of a generation."""
    return f"{PREFIX}{target}-{generation}"


def low_name(name: str) -> str:
    """The name of what stands beside the bitmap `name`, for what was cut off from the disk."""
    return f"{name}.low"


def plan(disk: Disk, target: str, generation: str, bases: Mapping[str, Base]) -> Checkpoint:
    """How the disk's backup starts from what the state store knows of the target: each disk's base, by its name."""
    base = bases.get(disk.name)
    if base is None:
        reason = f"no backup of this disk was committed to the target yet{_moved(disk, target, bases)}"
        return Checkpoint(target, generation, None, "new", reason)
    name = bitmap_name(target, base.generation)
    problem = unusable(disk.format, name)
    if problem:
        reason = f"the bitmap {name} {problem}{_moved(disk, target, bases)}"
        return Checkpoint(target, generation, None, "invalid", reason)
    low = low_water(find(disk.format, low_name(name)), base.size)
    return Checkpoint(target, generation, base.generation, "reuse", "", low or 0)


def _moved(disk: Disk, target: str, bases: Mapping[str, Base]) -> str:
    """What to add where the disk has the bitmap of another one: its image is now called otherwise."""
    others = [
        name
        for name, base in bases.items()
        if name != disk.name and find(disk.format, bitmap_name(target, base.generation))
    ]
    return f"; it carries the bitmap of the disk that was called {', '.join(others)}" if others else ""


def find(node: Node, name: str) -> Mapping[str, Any] | None:
    """What query-named-block-nodes says of the node's bitmap of that name."""
    return next((bitmap for bitmap in node.bitmaps if bitmap.get("name") == name), None)


def count(node: Node, name: str) -> int | None:
    """How many bytes the node's bitmap of that name calls dirty; None where there is no such bitmap."""
    bitmap = find(node, name)
    return None if bitmap is None else int(bitmap["count"])


def unusable(node: Node, name: str) -> str:
    """Why the node's bitmap of that name does not hold every change since its generation; empty where it does."""
    bitmap = find(node, name)
    if bitmap is None:
        return "is not there: QEMU was restarted or crashed, or the image was changed"
    if bitmap.get("inconsistent"):
        return "was not stored completely: QEMU crashed"
    if not bitmap.get("recording"):
        return "was disabled by somebody"
    if bitmap.get("busy"):  # it can then not even be copied (QEMU 7.2)
        return "is in use by another backup or export"
    if bitmap["granularity"] != GRANULARITY:
        return f"has granularity {bitmap['granularity']}, not {GRANULARITY}"
    if low_water(find(node, low_name(name)), 0) is None:
        return "has lost its companion, which tells of resizes"
    return ""


def of_target(nodes: Collection[Node], target: str) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Every bitmap of a target: node, generation, what QEMU says of it."""
    pattern = re.compile(rf"{re.escape(PREFIX + target)}-({GENERATION})(?:\.low)?")
    return [
        (node.name, match[1], bitmap)
        for node in nodes
        for bitmap in node.bitmaps
        if (match := pattern.fullmatch(bitmap.get("name", "")))
    ]


async def remove_leftovers(qmp: Qmp, target: str, committed: Collection[str]) -> list[str]:
    """Remove the target's bitmaps of generations that are not in `committed`; returns what was removed.

    Inconsistent ones go too: nothing else works with them, and while they are there the disk cannot be resized.
    """
    removed = []
    for node, generation, bitmap in of_target((await look_at_nodes(qmp)).values(), target):
        if generation not in committed or bitmap.get("inconsistent"):
            await qmp.execute("block-dirty-bitmap-remove", {"node": node, "name": bitmap["name"]})
            removed.append(f"removed the bitmap {bitmap['name']} of {node}")
    return removed


@asynccontextmanager
async def low_water_marks(qmp: Qmp, checkpoints: Sequence[tuple[Disk, Checkpoint]], state: Kept) -> AsyncIterator[None]:
    """What tells how small each disk was from now on; at the end they go, unless `state` says that they stay."""
    try:
        for size in sorted({disk.format.size for disk, _ in checkpoints}):
            async with marking(qmp, size) as source:
                actions = [
                    action
                    for disk, checkpoint in checkpoints
                    if disk.format.size == size
                    for action in add_all_set(
                        disk.format.name, low_name(checkpoint.new), GRANULARITY, _persistent(disk), source
                    )
                ]
                await qmp.execute("transaction", {"actions": actions})
        yield
    finally:
        if not state.kept:
            await _remove(qmp, [(disk.format.name, low_name(checkpoint.new)) for disk, checkpoint in checkpoints])


async def record(qmp: Qmp, checkpoints: Sequence[tuple[Disk, Checkpoint]]) -> None:
    """The new bitmaps, from now on. Raises QmpError."""
    actions = [
        {
            "type": "block-dirty-bitmap-add",
            "data": {
                "node": disk.format.name,
                "name": checkpoint.new,
                "granularity": GRANULARITY,
                "persistent": _persistent(disk),
            },
        }
        for disk, checkpoint in checkpoints
    ]
    if actions:
        await qmp.execute("transaction", {"actions": actions})


async def drop_unkept(qmp: Qmp, checkpoints: Sequence[tuple[Disk, Checkpoint]], state: Kept) -> None:
    """Undo `record`, unless `state` says that the new bitmaps stay."""
    if not state.kept:
        await _remove(qmp, [(disk.format.name, checkpoint.new) for disk, checkpoint in checkpoints])


async def copy_maps(qmp: Qmp, maps: Sequence[tuple[str, Disk, Checkpoint]]) -> None:
    """Copy each base into a bitmap of the node named first, in one transaction. Raises QmpError."""
    actions: list[Mapping[str, object]] = []
    for node, disk, checkpoint in maps:
        new = {"node": node, "name": MAP, "granularity": GRANULARITY, "disabled": True}
        source = {"node": disk.format.name, "name": checkpoint.old}
        actions.append({"type": "block-dirty-bitmap-add", "data": new})
        actions.append({"type": "block-dirty-bitmap-merge", "data": {"node": node, "target": MAP, "bitmaps": [source]}})
    if actions:
        await qmp.execute("transaction", {"actions": actions})


async def keep(qmp: Qmp, state: Kept, checkpoints: Sequence[tuple[Disk, Checkpoint]]) -> None:
    """The new bitmaps stay, the bases go. The state store must name the new generations already."""
    state.kept = True
    bases = [(disk.format.name, point.old) for disk, point in checkpoints if point.base]
    await _remove(qmp, [(node, name) for node, base in bases for name in (base, low_name(base))])


def _persistent(disk: Disk) -> bool:
    return disk.format.driver in PERSISTENT


async def _remove(qmp: Qmp, bitmaps: Sequence[tuple[str, str]]) -> None:
    for node, name in bitmaps:
        with undoing(f"remove the bitmap {name} of {node}"):
            try:
                await qmp.execute("block-dirty-bitmap-remove", {"node": node, "name": name})
            except QmpRefusedError:
                found = (await look_at_nodes(qmp)).get(node)
                if found is not None and find(found, name):
                    raise
