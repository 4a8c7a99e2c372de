# SPDX-License-Identifier: LGPL-2.1-or-later
"""Look once more at the disks, directly before the devices are given our filters and directly after it.

Seconds lie between the first look and the moment, and QMP has no compare-and-swap. What came before our filter is seen
by the look before, what came after it by the look after, and none of it was ever out of the guest's way: how that is
so, each recipe says.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from qfsbackup.errors import UserError
from qfsbackup.vm.bitmaps.checkpoint import Checkpoint, count, find, unusable
from qfsbackup.vm.look.graph import Device, Graph, Node, look_at_graph, look_at_nodes
from qfsbackup.vm.monitor import Monitor
from qfsbackup.vm.ours import PREFIX


@dataclass(frozen=True, slots=True)
class Filtered:
    """A disk as the first look saw it, the filter that is to stand on it, the node that this copies to, and the disk's
    checkpoint, if it gets one."""

    disk: Device
    filter: str
    fleecing: str
    checkpoint: Checkpoint | None


async def look_before(qmp: Monitor, expected: Collection[Filtered]) -> None:
    """Nothing is otherwise than at the first look, and nobody is at work. Raises UserError, QmpError."""
    nodes = await look_at_nodes(qmp)
    graph = await look_at_graph(qmp)
    for filtered in expected:
        changed = _changed(filtered, nodes) or _other_root(filtered, graph, filtered.disk.root.name)
        refuse(filtered, changed or _at_work(filtered.disk, graph) or _bitmap_changed(filtered, nodes))


async def look_after(qmp: Monitor, expected: Collection[Filtered]) -> None:
    """Each device has its filter, and nothing else has changed meanwhile. Raises UserError, QmpError."""
    nodes = await look_at_nodes(qmp)
    graph = await look_at_graph(qmp)
    for filtered in expected:
        changed = _changed(filtered, nodes) or _other_root(filtered, graph, filtered.filter)
        refuse(filtered, changed or _not_recording(filtered, nodes))


def refuse(filtered: Filtered, what: str) -> None:
    """Raise UserError where there is something to be said."""
    if what:
        raise UserError(
            f"somebody is at work on disk {filtered.disk.name} just now: {what}",
            "Wait for the end of it, and try again.",
        )


def _changed(filtered: Filtered, nodes: Mapping[str, Node]) -> str:
    disk, filter_node = filtered.disk, nodes.get(filtered.filter)
    if filter_node is not None and filter_node.children.get("file") != disk.root.name:
        return "another node stands on it now"
    for then in disk.nodes:
        now = nodes.get(then.name)
        if now is None or now.children != then.children:
            return f"its block node {then.name} is gone, or stands on another one now"
        if now.size != then.size:
            return f"it was resized from {then.size} to {now.size} bytes"
        jobs = [job for job in now.jobs if not job.startswith(PREFIX)]
        if jobs:
            return f"a block job ({', '.join(jobs)}) runs"
    return ""


def _other_root(filtered: Filtered, graph: Graph, wanted: str) -> str:
    root = graph.roots.get(filtered.disk.backend)
    return "" if root == wanted else f"its device has {root or 'no medium'} now, not {wanted}"


def _at_work(disk: Device, graph: Graph) -> str:
    names = {node.name for node in disk.nodes}
    jobs = sorted({job for job, node in graph.jobs if node in names})
    return f"a block job ({', '.join(jobs)}) runs" if jobs else ""


def _bitmap_changed(filtered: Filtered, nodes: Mapping[str, Node]) -> str:
    """The base must be as it was, but for what the guest has written since."""
    point, then = filtered.checkpoint, filtered.disk.format
    if point is None or point.base is None:
        return ""
    now = nodes[then.name]
    problem = unusable(now, point.old)
    if problem:
        return f"the bitmap {point.old} {problem}"
    less = (count(now, point.old) or 0) < (count(then, point.old) or 0)
    return f"the bitmap {point.old} was cleared" if less else ""


def _not_recording(filtered: Filtered, nodes: Mapping[str, Node]) -> str:
    if filtered.checkpoint is None:
        return ""
    bitmap = find(nodes[filtered.disk.format.name], filtered.checkpoint.new)
    return "" if bitmap and bitmap.get("recording") else f"the bitmap {filtered.checkpoint.new} does not record"
