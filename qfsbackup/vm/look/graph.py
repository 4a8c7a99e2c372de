# SPDX-License-Identifier: LGPL-2.1-or-later
"""Look at a VM: its disks, its block nodes and who else is at work on them. Nothing is changed here.

guest device --drive--> root node --file--> ... filters ... --file--> format node --file--> protocol node
                        (throttle, copy-on-read, ...)                 bitmaps live here
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qfsbackup.errors import UserError
from qfsbackup.vm.look.names import Place, disk_names, qdev_id, qom_path
from qfsbackup.vm.monitor import Monitor, QmpRefusedError
from qfsbackup.vm.quirks import Version

# Drivers that pass the guest's bytes through unchanged (`is_filter` in QEMU 10's block/*.c).
FILTERS = frozenset(
    [
        *["blkdebug", "blklogwrites", "blkreplay", "blkverify", "commit_top", "compress", "copy-before-write"],
        *["copy-on-read", "mirror_top", "preallocate", "throttle"],
    ]
)
KINDS = ("block-driver", "block-backend", "block-job")  # of what x-debug-query-block-graph calls nodes
LOOKS = 5  # at most, until two queries fit together
NIL_UUID = "00000000-0000-0000-0000-000000000000"  # what QEMU tells where nobody gave one


@dataclass(frozen=True, slots=True)
class Node:
    """A block node. `size` is what its user sees, in bytes; `children` are node names by role (`file`, `backing`)."""

    name: str
    driver: str
    size: int
    read_only: bool
    filename: str
    children: Mapping[str, str]
    bitmaps: tuple[Mapping[str, Any], ...]
    snapshots: tuple[str, ...] = ()  # names of the internal snapshots
    jobs: tuple[str, ...] = ()  # the block jobs at work on it: directly, or on a filter that stands on it


@dataclass(frozen=True, slots=True)
class Device:
    """A guest block device. `nodes` lead from the root node through filters to the format node; empty: no medium."""

    name: str
    qdev: str  # absolute QOM path of what has the `drive` property
    kind: str  # QOM type: virtio-blk-device, scsi-hd, ide-cd, cfi.pflash01, ...
    removable: bool
    iothread: bool
    nodes: tuple[Node, ...]
    backend: str = ""  # what `Graph.roots` calls it

    @property
    def root(self) -> Node:
        return self.nodes[0]

    @property
    def format(self) -> Node:
        """The node the guest's data is described by: format, bitmaps."""
        return self.nodes[-1]

    @property
    def cdrom(self) -> bool:
        return self.kind.endswith("-cd")


@dataclass(frozen=True, slots=True)
class Graph:
    """Who stands on whom: node names by role for each node, the node of each guest device, the jobs' nodes."""

    children: Mapping[str, Mapping[str, str]]
    roots: Mapping[str, str]  # by the drive's name, else by what `query-block` calls qdev
    jobs: Sequence[tuple[str, str]]  # a job's id and a node that it is at work on


@dataclass(frozen=True, slots=True)
class Machine:
    """A VM as it was when `look` looked."""

    version: Version
    name: str | None
    uuid: str | None
    status: str  # QEMU's run state: running, paused, prelaunch, shutdown, ...
    migration: str | None  # status of the migration that QEMU remembers, if any
    disks: tuple[Device, ...]
    nodes: Mapping[str, Node]
    exports: tuple[Mapping[str, Any], ...]


async def look(qmp: Monitor) -> Machine:
    """The facts about a VM. Raises QmpError, and UserError where its block nodes change at every look."""
    uuid = (await qmp.execute("query-uuid"))["UUID"]
    nodes, blocks = await _look_at_devices(qmp)
    return Machine(
        version=await look_at_version(qmp),
        name=(await qmp.execute("query-name")).get("name"),
        uuid=None if uuid == NIL_UUID else uuid,
        status=(await qmp.execute("query-status"))["status"],
        migration=(await qmp.execute("query-migrate")).get("status"),
        disks=await _disks(qmp, nodes, blocks),
        nodes=nodes,
        exports=tuple(await qmp.execute("query-block-exports")),
    )


async def look_at_version(qmp: Monitor) -> Version:
    """QEMU's own. Raises QmpError."""
    version = (await qmp.execute("query-version"))["qemu"]
    return version["major"], version["minor"], version["micro"]


async def running(qmp: Monitor) -> bool:
    """Do the guest's CPUs run? Raises QmpError."""
    answer: bool = (await qmp.execute("query-status"))["running"]
    return answer


async def look_at_nodes(qmp: Monitor) -> Mapping[str, Node]:
    """All block nodes by name. Raises QmpError."""
    graph = await look_at_graph(qmp)
    found = {
        node["node-name"]: Node(
            name=node["node-name"],
            driver=node["drv"],
            size=node["image"]["virtual-size"],
            read_only=node["ro"],
            filename=node["file"],
            children=graph.children.get(node["node-name"], {}),
            bitmaps=tuple(node.get("dirty-bitmaps", ())),
            snapshots=tuple(snapshot["name"] for snapshot in node["image"].get("snapshots", ())),
        )
        for node in await qmp.execute("query-named-block-nodes", {"flat": True})
    }
    for job, top in graph.jobs:
        for node in nodes_under(found, top):
            found[node.name] = replace(node, jobs=(*node.jobs, job))
    return found


async def look_at_graph(qmp: Monitor) -> Graph:
    """Who stands on whom now; one command, for no other one tells it. Raises QmpError.

    Seen in QEMU 7.2 and 10.0; it is marked unstable.
    """
    graph = await qmp.execute("x-debug-query-block-graph")
    names = {kind: {node["id"]: node["name"] for node in graph["nodes"] if node["type"] == kind} for kind in KINDS}
    nodes, devices, jobs = (names[kind] for kind in KINDS)
    children: dict[str, dict[str, str]] = {name: {} for name in nodes.values()}
    for edge in graph["edges"]:
        if edge["parent"] in nodes:
            children[nodes[edge["parent"]]][edge["name"]] = nodes[edge["child"]]
    return Graph(children, dict(_named(graph["edges"], devices, nodes)), _named(graph["edges"], jobs, nodes))


def _named(
    edges: Sequence[Mapping[str, Any]], parents: Mapping[int, str], nodes: Mapping[int, str]
) -> list[tuple[str, str]]:
    return [(parents[edge["parent"]], nodes[edge["child"]]) for edge in edges if edge["parent"] in parents]


async def devices(qmp: Monitor) -> list[Mapping[str, Any]]:
    """The entries of `query-block` that belong to a guest device (a `-drive` without a device has no guest)."""
    return [block for block in await qmp.execute("query-block") if block.get("qdev")]


async def _look_at_devices(qmp: Monitor) -> tuple[Mapping[str, Node], list[Mapping[str, Any]]]:
    """All nodes, and the guest devices: two queries. A node that somebody puts in between them is a root that the first
    one does not know, and its disk would seem to have no medium, and be left out of the backup."""
    for _ in range(LOOKS):
        nodes = await look_at_nodes(qmp)
        blocks = await devices(qmp)
        if {root_name(block) for block in blocks} <= {"", *nodes}:
            return nodes, blocks
    raise UserError(
        "the VM's block nodes change at every look: somebody is at work on its disks",
        "Wait for the end of it, and try again.",
    )


async def _disks(qmp: Monitor, nodes: Mapping[str, Node], blocks: Sequence[Mapping[str, Any]]) -> tuple[Device, ...]:
    given = await qmp.disk_names()
    places = [
        Place(block["qdev"], block["device"], root_name(block), given.get(qdev_id(block["qdev"]), ""))
        for block in blocks
    ]
    return tuple(
        [
            await _disk(qmp, name, block, nodes_under(nodes, place.node))
            for name, place, block in zip(disk_names(places), places, blocks, strict=True)
        ]
    )


def root_name(block: Mapping[str, Any]) -> str:
    """The root node of an entry of `query-block`; empty without a medium."""
    name: str = block.get("inserted", {}).get("node-name", "")
    return name


def nodes_under(nodes: Mapping[str, Node], root: str) -> tuple[Node, ...]:
    """The node `root` and what is below it, down to the first that is not a filter."""
    found: list[Node] = []
    while root in nodes:
        node = nodes[root]
        found.append(node)
        root = filtered_child(node) if node.driver in FILTERS else ""
    return tuple(found)


def filtered_child(node: Node) -> str:
    """What a filter passes through (`mirror_top` and `commit_top` keep it as their backing child)."""
    return node.children.get("file") or node.children.get("backing", "")


async def _disk(qmp: Monitor, name: str, block: Mapping[str, Any], nodes: Sequence[Node]) -> Device:
    path = qom_path(block["qdev"])
    return Device(
        name=name,
        qdev=path,
        kind=await device_property(qmp, path, "type") or "",
        removable=block["removable"],
        iothread=await _in_iothread(qmp, path),
        nodes=tuple(nodes),
        backend=block["device"] or block["qdev"],
    )


async def _in_iothread(qmp: Monitor, path: str) -> bool:
    """A virtio-blk device has an iothread itself, a SCSI disk has its controller's."""
    bus = await device_property(qmp, path, "parent_bus") or ""
    for device in (path, bus.rpartition("/")[0]):
        for name in ("iothread", "iothread-vq-mapping"):
            if device and await device_property(qmp, device, name):
                return True
    return False


async def device_property(qmp: Monitor, path: str, name: str) -> Any:
    """A property of a device, None where it has none of that name. Raises QmpError."""
    try:
        return await qmp.execute("qom-get", {"path": path, "property": name})
    except QmpRefusedError:
        return None
