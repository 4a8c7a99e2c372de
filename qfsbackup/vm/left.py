# SPDX-License-Identifier: LGPL-2.1-or-later
"""What of ours is in a VM, asked of QEMU itself: after undoing, nothing may be.

Undoing logs what it cannot do and goes on, for the next step may still work; only a look tells how it ended. What stays
does so because somebody else uses it (a backup or mirror job that began on our filter), and until he does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qfsbackup.vm.fleecing import FDSET
from qfsbackup.vm.graph import Node, look_at_nodes
from qfsbackup.vm.owner import FROZEN, LINE, NEW, PREFIX, line_holds
from qfsbackup.vm.qmp import Qmp

KEEPS_FDSETS_BEFORE = (9, 0, 0)  # a VM that does not run keeps removed fdsets (monitor_fdset_cleanup of QEMU 7.2)


async def left(qmp: Qmp) -> list[str]:
    """Every node, export, character device and fdset of ours, with who uses it. Raises QmpError."""
    nodes = await look_at_nodes(qmp)
    exports = [export["id"] for export in await qmp.execute("query-block-exports")]
    found = [_describe(node, nodes) for name, node in sorted(nodes.items()) if name.startswith(PREFIX)]
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


async def _forgets_fdsets(qmp: Qmp) -> bool:
    version = (await qmp.execute("query-version"))["qemu"]
    new = (version["major"], version["minor"], version["micro"]) >= KEEPS_FDSETS_BEFORE
    return new or bool((await qmp.execute("query-status"))["running"])


def _describe(node: Node, nodes: Mapping[str, Node]) -> str:
    if node.name.startswith(NEW):
        return f"uncommitted bitmaps ({node.name})"
    if node.name == FROZEN:
        return f"file systems that may be frozen ({FROZEN})"
    users = [f"block job {job}" for job in node.jobs] or _above(node.name, nodes)
    return f"{node.name} (used by {', '.join(users)})" if users else node.name


def _above(name: str, nodes: Mapping[str, Node]) -> Sequence[str]:
    """Nodes of others that stand on this one."""
    return [
        other.name for other in nodes.values() if name in other.children.values() and not other.name.startswith(PREFIX)
    ]
