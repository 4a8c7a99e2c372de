# SPDX-License-Identifier: LGPL-2.1-or-later
"""The recipe: one frozen instant of several disks of a running VM, served over NBD for as long as the block lasts.

    guest --> qfsbackup-filter-N --file--> the disk           guest writes copy what they overwrite ...
                    |    \\--target--> qfsbackup-fleecing-N    ... here first
                    |
              qfsbackup-access-N --> NBD export qfsbackup-N    the disk as it was at the instant

All that can fail is made before the guest notices anything. Then, as briefly as possible: freeze the guest's file
systems (else, with several disks, stop its CPUs), let every device write through its filter, and go on. A filter that
fails breaks the snapshot, never the guest.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from qfsbackup.errors import UserError
from qfsbackup.vm.bitmaps.checkpoint import Checkpoint
from qfsbackup.vm.bitmaps.recording import MAP, Kept, Started, add_maps, copy_maps, keep, recording, restart
from qfsbackup.vm.fleecing import FleecingFile, fleecing_file, left_while_hanging
from qfsbackup.vm.fleecing_folder import FleecingFolder
from qfsbackup.vm.freeze import Freeze, Frozen, StillFrozenError, frozen
from qfsbackup.vm.look.graph import Device, Machine
from qfsbackup.vm.monitor import Monitor
from qfsbackup.vm.node import node, put_in, remove_node, take_out
from qfsbackup.vm.owner import FROZEN, PREFIX, add_mark, owned
from qfsbackup.vm.pause import Pause, running, stopped
from qfsbackup.vm.quirks import cbw_timeout, request_unit, tells_allocation
from qfsbackup.vm.second_look import Filtered, look_after, look_at_device, look_before
from qfsbackup.vm.server import listening_socket, nbd_server

FLEECING, FILTER, ACCESS = f"{PREFIX}fleecing-", f"{PREFIX}filter-", f"{PREFIX}access-"  # + the disk's number


@dataclass(frozen=True, slots=True)
class Served:
    """One disk of the snapshot: its NBD export's name, and its fleecing file where the guest can write to it."""

    disk: Device
    export: str
    fleecing: FleecingFile | None
    checkpoint: Checkpoint | None  # None where no target was named, and for a read-only disk
    request_unit: int | None  # bytes; a request must not cross a multiple of it, or its answer may be wrong
    allocation: bool  # may block status be asked for
    transient: str | None  # why the new bitmap ends with QEMU; empty: the image holds it; None: there is none


@dataclass(frozen=True, slots=True)
class Taken:
    """A snapshot. `instant` is in nanoseconds since the epoch; every write before it is in the snapshot."""

    instant: int
    frozen: bool  # from before the instant until behind it
    pause_ms: float  # how long the guest's CPUs were stopped
    served: tuple[Served, ...]
    keep: Callable[[], Awaitable[None]]  # the new bitmaps stay, the bases go


@asynccontextmanager
async def take(
    qmp: Monitor,
    machine: Machine,
    disks: Sequence[Device],
    *,
    checkpoints: Mapping[str, Checkpoint],
    in_image: bool,
    fleece: Path,
    socket_path: Path,
    freeze: Freeze,
) -> AsyncIterator[Taken]:
    """Take a snapshot of `disks` and serve it on the unix socket `socket_path`; undo all of it at the end.

    `checkpoints`, by the disk's name, are started at the instant; `in_image`: bitmaps are stored in the images that can
    hold them. Raises UserError and QmpError; the VM is then as it was.
    """
    writable = {number: disk for number, disk in enumerate(disks) if not disk.root.read_only}
    folder = FleecingFolder(fleece)
    await folder.check_space(len(writable))
    files: dict[int, FleecingFile] = {}
    async with AsyncExitStack() as stack, left_while_hanging(qmp, files):
        await stack.enter_async_context(owned(qmp))
        listener = stack.enter_context(listening_socket(socket_path))
        for number, disk in writable.items():
            file = fleecing_file(qmp, folder, f"{FLEECING}{number}", disk.root.size)
            files[number] = await stack.enter_async_context(file)
            await stack.enter_async_context(node(qmp, _filter(machine, number, disk)))
        points = {name: point for name, point in checkpoints.items() if point.recorded}
        filtered = {n: Filtered(disk, f"{FILTER}{n}", points.get(disk.name)) for n, disk in writable.items()}
        started, kept = [(disk, points[disk.name]) for disk in writable.values() if disk.name in points], Kept()
        transient = await stack.enter_async_context(recording(qmp, started, kept, in_image=in_image))
        await add_maps(qmp, _maps(filtered))
        moment = await _instant(qmp, filtered, started, freeze, stack)
        for number in writable:
            await stack.enter_async_context(node(qmp, _access(number)))
        await stack.enter_async_context(nbd_server(qmp, listener, len(disks)))
        for number in writable:
            await qmp.execute("block-export-add", _size_lock(number))
        for number, disk in enumerate(disks):
            await qmp.execute("block-export-add", _export(number, disk, checkpoints.get(disk.name)))
        served = tuple(
            _served(machine, number, disk, files.get(number), checkpoints.get(disk.name), transient.get(disk.name))
            for number, disk in enumerate(disks)
        )
        keeping = partial(keep, qmp, kept, started)
        yield Taken(moment.instant, moment.held, moment.pause.milliseconds, served, keeping)


def _served(
    machine: Machine,
    number: int,
    disk: Device,
    file: FleecingFile | None,
    checkpoint: Checkpoint | None,
    transient: str | None,
) -> Served:
    unit, allocation = request_unit(machine.version), tells_allocation(machine.version)
    return Served(disk, f"{PREFIX}{number}", file, checkpoint, unit, allocation, transient)


@dataclass(slots=True)
class _Moment:
    instant: int = 0
    pause: Pause = field(default_factory=Pause)
    held: bool = False


async def _instant(
    qmp: Monitor,
    filtered: Mapping[int, Filtered],
    started: Started,
    freeze: Freeze,
    stack: AsyncExitStack,
) -> _Moment:
    """The moment itself. What it pushes on `stack` takes the filters out of the guest's way again.

    Nothing is undone in here: before QEMU is asked anything more, the guest must be thawed.
    The new bitmaps record from before the filters copy, the maps are copied after: without a pause in between, both say
    too much rather than too little.
    """
    moment = _Moment()
    async with _frozen(qmp, freeze) as state, AsyncExitStack() as pause:
        with _deadline(state):
            await look_before(qmp, filtered.values())
            if not state.frozen and len(filtered) > 1 and await running(qmp):
                await pause.enter_async_context(stopped(qmp, moment.pause))
            moment.instant = time.time_ns()
            await restart(qmp, started)
            stack.push_async_callback(take_out, qmp, [item.filter for item in filtered.values()])
            for item in filtered.values():
                await look_at_device(qmp, item)
                await put_in(qmp, item.disk, item.filter)
            await copy_maps(qmp, _maps(filtered))
    await look_after(qmp, filtered.values())
    moment.held = state.held
    return moment


def _maps(filtered: Mapping[int, Filtered]) -> list[tuple[str, Device, Checkpoint]]:
    points = [(f"{FLEECING}{number}", item.disk, item.checkpoint) for number, item in filtered.items()]
    return [(target, disk, point) for target, disk, point in points if point and point.base]


@asynccontextmanager
async def _frozen(qmp: Monitor, freeze: Freeze) -> AsyncIterator[Frozen]:
    """As `frozen`, with a mark for as long as the guest may be frozen by us, that cleanup thaws it."""
    async with AsyncExitStack() as mark:
        runs = await running(qmp)
        if freeze.tried:
            mark.push_async_callback(remove_node, qmp, FROZEN)
            await add_mark(qmp, FROZEN)
        try:
            async with frozen(freeze, running=runs) as state:
                yield state
        except StillFrozenError:
            mark.pop_all()
            raise


@contextmanager
def _deadline(state: Frozen) -> Iterator[None]:
    try:
        with trio.fail_at(state.deadline):
            yield
    except trio.TooSlowError:
        raise UserError(
            "the VM's disks did not come to rest while its file systems were frozen", "Try again when it writes less."
        ) from None


def _filter(machine: Machine, number: int, disk: Device) -> Mapping[str, object]:
    return {
        "driver": "copy-before-write",
        "node-name": f"{FILTER}{number}",
        "file": disk.root.name,
        "target": f"{FLEECING}{number}",
        "on-cbw-error": "break-snapshot",
        "cbw-timeout": cbw_timeout(machine.version),
        "discard": "unmap",  # or the guest's trims would be dropped
    }


def _access(number: int) -> Mapping[str, object]:
    return {
        "driver": "snapshot-access",
        "node-name": f"{ACCESS}{number}",
        "file": f"{FILTER}{number}",
        "discard": "unmap",  # or a trim over NBD would do nothing
    }


def _size_lock(number: int) -> Mapping[str, object]:
    """An export of the filter that nobody reads: while it is there QEMU refuses to resize the disk.

    The filter's own bitmaps would shrink with the disk, and the next read of the snapshot would abort QEMU: assertion
    start + count <= hb->orig_size in hbitmap_status (seen with 7.2.22 and 10.0.2).
    """
    name = f"{PREFIX}size-{number}"
    return {"type": "nbd", "id": name, "name": name, "node-name": f"{FILTER}{number}", "writable": False}


def _export(number: int, disk: Device, checkpoint: Checkpoint | None) -> Mapping[str, object]:
    """Writable where there is something to trim (writing itself is refused by snapshot-access)."""
    bitmaps = [{"node": f"{FLEECING}{number}", "name": MAP}] if checkpoint and checkpoint.base else []
    return {
        "type": "nbd",
        "id": f"{PREFIX}{number}",
        "name": f"{PREFIX}{number}",
        "node-name": disk.root.name if disk.root.read_only else f"{ACCESS}{number}",
        "writable": not disk.root.read_only,
        "bitmaps": bitmaps,
    }
