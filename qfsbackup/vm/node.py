# SPDX-License-Identifier: LGPL-2.1-or-later
"""Block nodes that exist for the length of a block, and filters put between a guest device and its disk.

Undoing never raises: what cannot be undone is logged, and the next step is tried. It asks QEMU what there is instead of
trusting what we remember, because the VM went on living: disks are unplugged, media ejected, snapshots taken below us.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import trio

from qfsbackup.vm.look.graph import Device, Graph, devices, look_at_graph, look_at_nodes
from qfsbackup.vm.look.names import qom_path
from qfsbackup.vm.monitor import Monitor, QmpError, QmpGoneError, QmpRefusedError

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
async def node(qmp: Monitor, options: Mapping[str, object]) -> AsyncIterator[str]:
    """A node made by `blockdev-add` with these options; yields its name. Raises QmpError."""
    name = str(options["node-name"])
    try:
        await qmp.execute("blockdev-add", options)
        yield name
    finally:
        await remove_node(qmp, name)


async def remove_node(qmp: Monitor, name: str) -> None:
    """Remove a node if it is there."""
    with undoing(f"remove the block node {name}"):
        try:
            await qmp.execute("blockdev-del", {"node-name": name})
        except QmpRefusedError:
            if name in await look_at_nodes(qmp):
                raise


async def put_in(qmp: Monitor, disk: Device, filter_name: str) -> None:
    """Put a filter that stands on the disk's root node between it and the guest device.

    Raises QmpError; it may be in all the same, for QEMU 7.2 can answer with an error and replace the node.
    """
    await qmp.execute("qom-set", {"path": disk.qdev, "property": "drive", "value": filter_name})


async def take_out(qmp: Monitor, filters: Collection[str]) -> None:
    """Give every device whose root is one of these filters what that stands on *now*; leave all others alone.

    Look directly before and after, and once more where somebody puts a node below a filter in this very moment: QEMU
    then refuses, for the device would go round a node that needs to see the guest's writes, or the look afterwards
    finds another node below the filter than the one that the device was given (measured with QEMU 7.2.22 and 10.0.2).
    """
    with undoing(f"take {', '.join(filters)} out of the guest's way"):
        paths = {device["device"] or device["qdev"]: qom_path(device["qdev"]) for device in await devices(qmp)}
        given: dict[str, _Given] = {}
        refusal = None
        for _ in range(TRIES):
            found = _wrong(await look_at_graph(qmp), filters, given)
            wrong = {backend: what for backend, what in found.items() if backend in paths}  # an export has one, too
            if not wrong:
                return
            given |= wrong
            for backend, what in wrong.items():
                try:
                    await qmp.execute("qom-set", {"path": paths[backend], "property": "drive", "value": what.node})
                except QmpRefusedError as error:
                    refusal = error
        if refusal:
            raise refusal


@dataclass(frozen=True, slots=True)
class _Given:
    """The node that a device was given, which stood below the filter."""

    filter: str
    node: str


def _wrong(graph: Graph, filters: Collection[str], given: Mapping[str, _Given]) -> dict[str, _Given]:
    """What devices are to be given, by their backends: those with a filter, or with what is not below it any more.

    Where another node is a device's root now, somebody stands on the filter, and the device is his.
    """
    found = {}
    for backend, root in graph.roots.items():
        last = given.get(backend)
        name = root if root in filters else last.filter if last and last.node == root else ""
        below = graph.children.get(name, {}).get("file", "")
        if below and below != root:
            found[backend] = _Given(name, below)
    return found
