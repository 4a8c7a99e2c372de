# SPDX-License-Identifier: LGPL-2.1-or-later
r"""A copy-before-write node for each disk, which the guest's device is given instead of the disk.

    guest device --drive--> qfsbackup-filter-N --file--> the disk's root node
                                       \--target--> qfsbackup-fleecing-N

Devices are switched one after the other, so several disks are at one instant only if nobody writes meanwhile: where
the guest's file systems are not frozen its CPUs are stopped. As soon as a filter *stands* on a disk, not yet in the
guest's way, QEMU refuses a mirror or active commit of it ("Need a root block node"), and puts what a backup, a stream
or a snapshot adds between the filter and the disk, where the guest's writes still pass it (measured with QEMU 7.2.22
and 10.0.2).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass

from qfsbackup.vm.look.graph import Graph, devices, look_at_graph, running
from qfsbackup.vm.look.names import qom_path
from qfsbackup.vm.monitor import Monitor, QmpRefusedError
from qfsbackup.vm.node import remove_node, undoing
from qfsbackup.vm.ours import FILTER, STOPPED
from qfsbackup.vm.quirks import Version, cbw_timeout
from qfsbackup.vm.recipes.pause import Pause, resume, stopped
from qfsbackup.vm.recipes.recipe import Bitmaps, Moment
from qfsbackup.vm.second_look import Filtered, refuse
from qfsbackup.vm.transaction import transact

TRIES = 3  # for what somebody else may disturb in the very moment


def check(version: Version) -> None:
    """See Recipe, as for all functions here: any QEMU that is not refused at all will do."""


def filter_name(number: int) -> str:
    return f"{FILTER}{number}"


@asynccontextmanager
async def standing(qmp: Monitor, version: Version, disks: Sequence[Filtered]) -> AsyncIterator[None]:
    """Filters that nobody writes through yet."""
    try:
        for disk in disks:
            await qmp.execute("blockdev-add", _filter(version, disk))
        yield
    finally:
        await take_down(qmp, [disk.filter for disk in disks])


def _filter(version: Version, disk: Filtered) -> Mapping[str, object]:
    return {
        "driver": "copy-before-write",
        "node-name": disk.filter,
        "file": disk.disk.root.name,
        "target": disk.fleecing,
        "on-cbw-error": "break-snapshot",
        "cbw-timeout": cbw_timeout(version),
        "discard": "unmap",  # or the guest's trims would be dropped
    }


async def switch(qmp: Monitor, disks: Sequence[Filtered], bitmaps: Bitmaps, *, frozen: bool) -> Moment:
    """The new bitmaps record from before the filters copy, the maps are copied after: without a pause in between, both
    say too much rather than too little."""
    pause = Pause()
    async with AsyncExitStack() as stack:
        if not frozen and len(disks) > 1 and await running(qmp):
            await stack.enter_async_context(stopped(qmp, pause))
        instant = time.time_ns()
        await transact(qmp, bitmaps.begun)
        for disk in disks:
            await _look_at_device(qmp, disk)
            # It may be in also where this is refused: QEMU 7.2 can answer with an error and replace the node.
            await qmp.execute("qom-set", {"path": disk.disk.qdev, "property": "drive", "value": disk.filter})
        await transact(qmp, bitmaps.copied)
    return Moment(instant, pause.milliseconds)


async def _look_at_device(qmp: Monitor, disk: Filtered) -> None:
    """Its root is what it was: the last command before the switch, and a quick one. Raises UserError, QmpError.

    (Of a legacy drive QEMU tells the name only; what else there is to see, the look after sees.)
    """
    device = disk.disk
    root = await qmp.execute("qom-get", {"path": device.qdev, "property": "drive"})
    refuse(disk, "" if root in (device.root.name, device.backend) else f"its device has {root or 'no medium'} now")


def watched(qmp: Monitor, disks: Sequence[Filtered], lost: Callable[[str], None]) -> AbstractAsyncContextManager[None]:
    """QEMU lets nobody remove a filter, or give its device another node, while snapshot-access stands on it."""
    return nullcontext()


async def free_guest(qmp: Monitor, ours: Collection[str]) -> list[str]:
    """Let a guest that we stopped run on."""
    if STOPPED not in ours:
        return []
    stood = not await running(qmp)
    await resume(qmp)
    return ["let the guest run on"] if stood and await running(qmp) else []


async def take_down(qmp: Monitor, ours: Collection[str]) -> None:
    """Take the filters out of the guest's way, then away."""
    filters = sorted(name for name in ours if name.startswith(FILTER))
    if filters:
        await _take_out(qmp, filters)
    for name in filters:
        await remove_node(qmp, name)


async def _take_out(qmp: Monitor, filters: Collection[str]) -> None:
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
