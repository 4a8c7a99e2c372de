# SPDX-License-Identifier: LGPL-2.1-or-later
"""What of ours is in a VM, asked of QEMU itself: after undoing, nothing may be.

Undoing logs what it cannot do and goes on, for the next step may still work; only a look tells how it ended. What stays
does so because somebody else uses it (a backup or mirror job that began on our filter), and until he does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qfsbackup.vm.look.graph import Graph, look_at_graph, look_at_version, running
from qfsbackup.vm.monitor import Monitor
from qfsbackup.vm.ours import FDSET, FROZEN, LINE, NEW, PREFIX
from qfsbackup.vm.owner import line_holds
from qfsbackup.vm.quirks import keeps_fdsets


async def left(qmp: Monitor) -> list[str]:
    """Every node, export, character device and fdset of ours, with who uses it. Raises QmpError.

    Names alone: to tell more of a fleecing file QEMU asks its file system, and would hang with that.
    """
    graph = await look_at_graph(qmp)
    exports = [export["id"] for export in await qmp.execute("query-block-exports")]
    found = [_describe(name, graph) for name in sorted(graph.children) if name.startswith(PREFIX)]
    found += [f"the export {name}" for name in exports if name.startswith(PREFIX)]
    if await line_holds(qmp) is not None:
        found.append(f"the character device {LINE}")
    if await _forgets_fdsets(qmp):
        found += [
            f"the file descriptor set {fdset['fdset-id']}"
            for fdset in await qmp.execute("query-fdsets")
            if _ours(fdset)
        ]
    return found


def _ours(fdset: Mapping[str, Any]) -> bool:
    return any(fd.get("opaque") == FDSET for fd in fdset["fds"])


async def _forgets_fdsets(qmp: Monitor) -> bool:
    return not keeps_fdsets(await look_at_version(qmp)) or await running(qmp)


def _describe(name: str, graph: Graph) -> str:
    if name.startswith(NEW):
        return f"uncommitted bitmaps ({name})"
    if name == FROZEN:
        return f"file systems that may be frozen ({name})"
    users = _users(name, graph)
    return f"{name} (used by {', '.join(users)})" if users else name


def _users(name: str, graph: Graph) -> list[str]:
    """The jobs at work on this node or on what others have put on it, else these nodes."""
    above = [other for other, children in graph.children.items() if name in children.values()]
    others = [other for other in above if not other.startswith(PREFIX)]
    jobs = sorted({job for job, node in graph.jobs if node in (name, *others)})
    return [f"block job {job}" for job in jobs] or others
