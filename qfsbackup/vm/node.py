# SPDX-License-Identifier: LGPL-2.1-or-later
"""Block nodes that exist for the length of a block, and filters put between a guest device and its disk.

Undoing never raises: what cannot be undone is logged, and the next step is tried. It asks QEMU what there is instead of
trusting what we remember, because the VM went on living: disks are unplugged, media ejected, snapshots taken below us.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager

import trio

from qfsbackup.vm.graph import Disk, devices, filtered_child, look_at_nodes, root_name
from qfsbackup.vm.names import qom_path
from qfsbackup.vm.qmp import Qmp, QmpError, QmpGoneError, QmpRefusedError

log = logging.getLogger(__name__)
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


@asynccontextmanager
async def inserted(qmp: Qmp, disk: Disk, filter_name: str) -> AsyncIterator[None]:
    """Put a filter that stands on the disk's root node between it and the guest device. Raises QmpError."""
    try:
        # QEMU 7.2 may answer with an error and replace the node all the same: take_out looks for itself.
        await qmp.execute("qom-set", {"path": disk.qdev, "property": "drive", "value": filter_name})
        yield
    finally:
        await take_out(qmp, filter_name)


async def take_out(qmp: Qmp, filter_name: str) -> None:
    """Give every device whose root is this filter what the filter stands on *now*; leave all others alone."""
    with undoing(f"take the filter {filter_name} out"):
        for device in await devices(qmp):
            if root_name(device) == filter_name:
                below = filtered_child((await look_at_nodes(qmp))[filter_name])
                path = qom_path(device["qdev"])
                await qmp.execute("qom-set", {"path": path, "property": "drive", "value": below})
