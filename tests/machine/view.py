# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is ours in QEMU, and what is not: nothing that the product does may change the latter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qfsbackup.vm.ours import PREFIX
from qfsbackup.vm.quirks import keeps_fdsets
from tests.machine.world import World


def foreign(world: World) -> dict[str, Any]:
    """Nodes, devices, jobs, exports, fdsets and bitmaps of others, the devices as if our filters were not there."""
    nodes = [node for node in _nodes(world).values() if not our_node(node)]
    if len(world.plugged) < len(world.slots):
        nodes = []  # what is below an unplugged disk may be there only for as long as our filter stands on it
    return {
        "nodes": sorted((node["node-name"], node["drv"], node["ro"]) for node in nodes),
        "devices": sorted(_device(world, block) for block in world.qmp("query-block")),
        "bitmaps": sorted(name for names in bitmaps(world).values() for name in names if not ours(name)),
        "jobs": sorted(job["id"] for job in world.qmp("query-jobs") if not ours(job["id"])),
        "exports": sorted(one["id"] for one in world.qmp("query-block-exports") if not ours(one["id"])),
        "fdsets": sorted(name for name in _fdsets(world) if not ours(name)),
        "status": world.qmp("query-status")["status"],
    }


def below(world: World, name: str) -> str:
    """The node itself; where it is a filter of ours, the first below that is none."""
    children = _children(world) if name.startswith(PREFIX) else {}
    while name.startswith(PREFIX):
        name = children.get(name, "")
    return name


def left(world: World) -> list[str]:
    """Whatever is ours, but for bitmaps."""
    names = [node["node-name"] for node in _nodes(world).values() if our_node(node)]
    names += [job["id"] for job in world.qmp("query-jobs") if ours(job["id"])]
    names += [export["id"] for export in world.qmp("query-block-exports") if ours(export["id"])]
    return sorted([*names, *(name for name in _fdsets(world) if ours(name))])


def bitmaps(world: World) -> Mapping[str, Sequence[str]]:
    """The names of all bitmaps that have one, by the node's name."""
    nodes = _nodes(world).items()
    return {
        name: [bitmap["name"] for bitmap in node.get("dirty-bitmaps", ()) if "name" in bitmap] for name, node in nodes
    }


def checkpoints(world: World, target: str = "", *, writable: bool = False) -> dict[str, set[str]]:
    """Our bitmaps, of one target or of all, by the node's name; where there are none, nothing."""
    prefix = f"{PREFIX}{target}-" if target else PREFIX
    nodes = [name for name, node in _nodes(world).items() if not (writable and node["ro"])]
    found = bitmaps(world)
    named = {node: {name for name in found[node] if name.startswith(prefix)} for node in nodes if not ours(node)}
    return {node: names for node, names in named.items() if names}


def ours(name: str) -> bool:
    return PREFIX in name


def our_node(node: Mapping[str, Any]) -> bool:
    """One of ours has a name that QEMU gave it; nobody else here has one of that driver."""
    return ours(node["node-name"]) or node["drv"] == "blkdebug"


def _nodes(world: World) -> dict[str, dict[str, Any]]:
    return {node["node-name"]: node for node in world.qmp("query-named-block-nodes", flat=True)}


def _device(world: World, block: Mapping[str, Any]) -> tuple[str, ...]:
    inserted = block.get("inserted", {})
    root, size = below(world, inserted.get("node-name", "")), inserted.get("image", {}).get("virtual-size")
    return str(block.get("qdev")), block["device"], root, str(size), str(block.get("tray_open"))


def _children(world: World) -> dict[str, str]:
    """What each node passes through or describes, by name."""
    graph = world.qmp("x-debug-query-block-graph")
    names = {node["id"]: node["name"] for node in graph["nodes"]}
    edges = [edge for edge in graph["edges"] if edge["name"] == "file"]
    return {names[edge["parent"]]: names[edge["child"]] for edge in edges}


def _fdsets(world: World) -> list[str]:
    """What was said of each descriptor. QEMU 7.2 forgets a removed fdset only while the VM runs."""
    if keeps_fdsets(world.qemu.version) and world.qmp("query-status")["status"] != "running":
        return []
    return [str(fd.get("opaque")) for fdset in world.qmp("query-fdsets") for fd in fdset["fds"]]
