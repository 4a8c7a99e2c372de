# SPDX-License-Identifier: LGPL-2.1-or-later
"""Block nodes that exist for the length of a block, and filters put between a guest device and its disk.

Undoing never raises: what cannot be undone is logged, and the next step is tried. It asks QEMU what there is instead of
trusting what we remember, because the VM went on living: disks are unplugged, media ejected, snapshots taken below us.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import trio

from qfsbackup.vm.graph import Disk, devices, look_at_graph, look_at_nodes, root_name
from qfsbackup.vm.names import qom_path
from qfsbackup.vm.qmp import Qmp, QmpError, QmpGoneError, QmpRefusedError

log = logging.getLogger(__name__)
TRIES = 3  # for what somebody else may disturb in the very moment
UNDO_TIMEOUT = 60.0  # seconds for one step of undoing; a command's own deadline normally comes first


@contextmanager
def undoing(what: str) -> Iterator[None]:
    """One step of undoing: shielded from cancellation, with a deadline; a QmpError in it is logged, not raised."""
    problem = f"no answer within {UNDO_TIMEOUT:.0f} s"
    with trio.move_on_after(UNDO_TIMEOUT, shield=True):
        try:
            yield
        except QmpGoneError:
            return  # with it is gone what was to be undone
        except QmpError as error:
            problem = str(error)
        else:
            return
    log.error("could not %s: %s", what, problem)


@asynccontextmanager
async def node(qmp: Qmp, options: Mapping[str, object]) -> AsyncIterator[str]:
    """A node made by `blockdev-add` with these options; yields its name. Raises QmpError."""
    name = str(options["node-name"])
    try:
        await qmp.execute("blockdev-add", options)
        yield name
    finally:
        await remove_node(qmp, name)


async def remove_node(qmp: Qmp, name: str) -> None:
    """Remove a node if it is there."""
    with undoing(f"remove the block node {name}"):
        try:
            await qmp.execute("blockdev-del", {"node-name": name})
        except QmpRefusedError:
            if name in await look_at_nodes(qmp):
                raise


async def put_in(qmp: Qmp, disk: Disk, filter_name: str) -> None:
    """Put a filter that stands on the disk's root node between it and the guest device.

    Raises QmpError; it may be in all the same, for QEMU 7.2 can answer with an error and replace the node.
    """
    await qmp.execute("qom-set", {"path": disk.qdev, "property": "drive", "value": filter_name})


async def take_out(qmp: Qmp, filter_name: str) -> None:
    """Give every device whose root is this filter what the filter stands on *now*; leave all others alone."""
    with undoing(f"take the filter {filter_name} out"):
        for device in await devices(qmp):
            if root_name(device) == filter_name:
                await _take_out(qmp, device, filter_name)


async def _take_out(qmp: Qmp, device: Mapping[str, Any], filter_name: str) -> None:
    """Look directly before and after, and once more where somebody puts a node there in this very moment.

    QEMU then refuses, for the device would go round a node that needs to see the guest's writes, or the look afterwards
    finds another node below the filter than the one that the device was given (measured with QEMU 7.2.22 and 10.0.2).
    """
    path, backend = qom_path(device["qdev"]), device["device"] or device["qdev"]
    given, refusal = filter_name, None
    for _ in range(TRIES):
        graph = await look_at_graph(qmp)
        root, below = graph.roots.get(backend), graph.children.get(filter_name, {}).get("file", "")
        if root == below or root not in (filter_name, given):
            return  # it is out; or somebody stands on it, and the device is his
        given = below
        try:
            await qmp.execute("qom-set", {"path": path, "property": "drive", "value": below})
        except QmpRefusedError as error:
            refusal = error
    if refusal:
        raise refusal
