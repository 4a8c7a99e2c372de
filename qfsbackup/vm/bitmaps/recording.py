# SPDX-License-Identifier: LGPL-2.1-or-later
"""The bitmaps of one backup: two for each target while it lasts.

    ---- base records ----------------------------------+------------------------> removed by keep()
             new is added, records; instant: is cleared |---- new records -------> removed by leaving, without keep()
                                 base copied to the map '--> exported, on a node of ours

All that QEMU can refuse is done before the guest notices anything; at the instant the new bitmaps are only cleared, and
hold too much rather than too little until then. The map is a copy on our own node, because a resize of the guest's disk
aborts QEMU while a bitmap of its node is exported. A mark in QEMU (see owner) stands for each generation that is not
committed yet.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from qfsbackup.vm.bitmaps.checkpoint import GRANULARITY, Checkpoint, find, low_name
from qfsbackup.vm.bitmaps.low_water import add_all_set, marking
from qfsbackup.vm.look.graph import Device, look_at_nodes
from qfsbackup.vm.monitor import Monitor, QmpRefusedError
from qfsbackup.vm.node import remove_node, undoing
from qfsbackup.vm.ours import MAP, NEW
from qfsbackup.vm.owner import add_mark
from qfsbackup.vm.transaction import Actions

log = logging.getLogger(__name__)

PERSISTENT = frozenset(["qcow2"])  # raw: "Can't store persistent bitmaps" (QEMU 7.2, 10.0)

Started = Sequence[tuple[Device, Checkpoint]]
Maps = Sequence[tuple[str, Device, Checkpoint]]  # a node of ours for each disk that has a base


@dataclass(slots=True)
class Kept:
    """Whether the new bitmaps stay."""

    kept: bool = field(default=False)


@asynccontextmanager
async def recording(qmp: Monitor, started: Started, state: Kept, *, in_image: bool) -> AsyncIterator[Mapping[str, str]]:
    """The new bitmaps record from now on; at the end they go, unless `state` says that they stay. Raises QmpError.

    `in_image`: they are stored in the image where it can hold them. Yields, by the disk's name, why one is not; empty
    where it is.
    """
    reasons = {}
    try:
        for size in sorted({disk.format.size for disk, _ in started}):
            async with marking(qmp, size) as all_set:
                for disk, point in started:
                    if disk.format.size == size:
                        await add_mark(qmp, NEW + point.generation)
                        reasons[disk.name] = await _add(qmp, disk, point, all_set, in_image=in_image)
        yield reasons
    finally:
        if not state.kept:
            await _remove(qmp, [(disk, name) for disk, point in started for name in (point.new, low_name(point.new))])
            await _remove_marks(qmp, await _not_in_use(qmp, started))


async def _add(qmp: Monitor, disk: Device, point: Checkpoint, all_set: Mapping[str, str], *, in_image: bool) -> str:
    """Add a disk's new bitmap and its companion; why they end with QEMU, empty where the image holds them."""
    reason = "bitmaps=transient"
    if in_image:
        reason = "" if disk.format.driver in PERSISTENT else f"a {disk.format.driver} image holds none"
    if not reason:
        try:
            await _add_both(qmp, disk, point, all_set, persistent=True)
        except QmpRefusedError as error:  # qcow2 with compat=0.10, its bitmap directory full, ...
            log.warning("the bitmap of %s is kept until QEMU ends, and not in the image: %s", disk.name, error.desc)
            reason = error.desc
    if reason:
        await _add_both(qmp, disk, point, all_set, persistent=False)
    return reason


async def _add_both(
    qmp: Monitor, disk: Device, point: Checkpoint, all_set: Mapping[str, str], *, persistent: bool
) -> None:
    new = {"node": disk.format.name, "name": point.new, "granularity": GRANULARITY, "persistent": persistent}
    low = add_all_set(disk.format.name, low_name(point.new), GRANULARITY, persistent, all_set)
    await qmp.execute("transaction", {"actions": [{"type": "block-dirty-bitmap-add", "data": new}, *low]})


def restart(started: Started) -> Actions:
    """The instant: what was written before it does not count."""
    return [
        {"type": "block-dirty-bitmap-clear", "data": {"node": disk.format.name, "name": point.new}}
        for disk, point in started
    ]


async def add_maps(qmp: Monitor, maps: Maps) -> None:
    """Empty maps on the nodes named first. Raises QmpError."""
    for node, _, _ in maps:
        new = {"node": node, "name": MAP, "granularity": GRANULARITY, "disabled": True}
        await qmp.execute("block-dirty-bitmap-add", new)


def copy_maps(maps: Maps) -> Actions:
    """Copy each base into its map."""
    actions = []
    for node, disk, checkpoint in maps:
        source = {"node": disk.format.name, "name": checkpoint.old}
        actions.append({"type": "block-dirty-bitmap-merge", "data": {"node": node, "target": MAP, "bitmaps": [source]}})
    return actions


async def keep(qmp: Monitor, state: Kept, started: Started) -> None:
    """The new bitmaps stay, the bases go. The state store must name the new generations already."""
    state.kept = True
    await _remove_marks(qmp, started)
    await _remove(qmp, [(disk, n) for disk, point in started if point.base for n in (point.old, low_name(point.old))])


async def _remove(qmp: Monitor, bitmaps: Sequence[tuple[Device, str]]) -> None:
    for disk, name in bitmaps:
        node = disk.format.name
        with undoing(f"remove the bitmap {name} of {node}"):
            try:
                await qmp.execute("block-dirty-bitmap-remove", {"node": node, "name": name})
            except QmpRefusedError:
                found = (await look_at_nodes(qmp)).get(node)
                if found is not None and find(found, name):
                    raise


async def _not_in_use(qmp: Monitor, started: Started) -> Started:
    """Those whose bitmaps are gone, or can never be removed; the marks of the others stay, for who tries again."""
    with undoing("see whether the new bitmaps are gone"):
        nodes = await look_at_nodes(qmp)
        busy = {str(bitmap.get("name")) for node in nodes.values() for bitmap in node.bitmaps if bitmap.get("busy")}
        return [(disk, point) for disk, point in started if not busy & {point.new, low_name(point.new)}]
    return []


async def _remove_marks(qmp: Monitor, started: Started) -> None:
    for _, point in started:
        await remove_node(qmp, NEW + point.generation)
