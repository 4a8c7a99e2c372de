# SPDX-License-Identifier: LGPL-2.1-or-later
"""One frozen instant of several disks of a running VM, served over NBD for as long as the block lasts.

    guest --> a node of the recipe's --file--> the disk        guest writes copy what they overwrite ...
                    |   \\--target--> qfsbackup-fleecing-N      ... here first
                    |
              qfsbackup-access-N --> NBD export qfsbackup-N    the disk as it was at the instant

All that can fail is made before the guest notices anything. Then, as briefly as possible: freeze the guest's file
systems, have the recipe (see recipes) let every device write through its node, and go on. A node that fails breaks the
snapshot, never the guest.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from qfsbackup.errors import UserError
from qfsbackup.vm.bitmaps.checkpoint import Checkpoint
from qfsbackup.vm.bitmaps.recording import Kept, add_maps, copy_maps, keep, recording, restart
from qfsbackup.vm.fleecing import FleecingFile, fleecing_file, left_while_hanging
from qfsbackup.vm.fleecing_folder import FleecingFolder
from qfsbackup.vm.freeze import Freeze, Frozen, StillFrozenError, frozen
from qfsbackup.vm.look.graph import Device, Machine, running
from qfsbackup.vm.monitor import Monitor
from qfsbackup.vm.node import node, remove_node
from qfsbackup.vm.ours import ACCESS, FLEECING, FROZEN, MAP, PREFIX, SIZE
from qfsbackup.vm.owner import add_mark, owned
from qfsbackup.vm.quirks import request_unit, tells_allocation
from qfsbackup.vm.recipes.recipe import Bitmaps, Moment, Recipe
from qfsbackup.vm.second_look import Filtered, look_after, look_before
from qfsbackup.vm.server import listening_socket, nbd_server


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
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    in_image: bool,
    fleece: Path,
    socket_path: Path,
    freeze: Freeze,
    lost: Callable[[str], None],
) -> AsyncIterator[Taken]:
    """Take a snapshot of `disks` and serve it on the unix socket `socket_path`; undo all of it at the end.

    `checkpoints`, by the disk's name, are started at the instant; `in_image`: bitmaps are stored in the images that can
    hold them; `lost` hears why the snapshot can be read no more, should somebody take it down. Raises UserError and
    QmpError; the VM is then as it was.
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
        points = {name: point for name, point in checkpoints.items() if point.recorded}
        filtered = [
            Filtered(disk, recipe.filter_name(n), f"{FLEECING}{n}", points.get(disk.name))
            for n, disk in writable.items()
        ]
        started, kept = [(disk, points[disk.name]) for disk in writable.values() if disk.name in points], Kept()
        transient = await stack.enter_async_context(recording(qmp, started, kept, in_image=in_image))
        maps = [(one.fleecing, one.disk, one.checkpoint) for one in filtered if one.checkpoint and one.checkpoint.base]
        await add_maps(qmp, maps)
        await stack.enter_async_context(recipe.standing(qmp, machine.version, filtered))
        moment, held = await _instant(qmp, recipe, filtered, Bitmaps(restart(started), copy_maps(maps)), freeze)
        for number in writable:
            await stack.enter_async_context(node(qmp, _access(number, recipe.filter_name(number))))
        await stack.enter_async_context(nbd_server(qmp, listener, len(disks)))
        for number in writable:
            await qmp.execute("block-export-add", _size_lock(number, recipe.filter_name(number)))
        for number, disk in enumerate(disks):
            await qmp.execute("block-export-add", _export(number, disk, checkpoints.get(disk.name)))
        await stack.enter_async_context(recipe.watched(qmp, filtered, lost))
        served = tuple(
            _served(machine, number, disk, files.get(number), checkpoints.get(disk.name), transient.get(disk.name))
            for number, disk in enumerate(disks)
        )
        yield Taken(moment.instant, held, moment.pause_ms, served, partial(keep, qmp, kept, started))


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


async def _instant(
    qmp: Monitor, recipe: Recipe, filtered: Sequence[Filtered], bitmaps: Bitmaps, freeze: Freeze
) -> tuple[Moment, bool]:
    """The moment itself, and whether the guest's file systems were frozen until behind it.

    Nothing is undone in here: before QEMU is asked anything more, the guest must be thawed.
    """
    async with _frozen(qmp, freeze) as state:
        with _deadline(state):
            await look_before(qmp, filtered)
            moment = await recipe.switch(qmp, filtered, bitmaps, frozen=state.frozen)
    await look_after(qmp, filtered)
    return moment, state.held


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


def _access(number: int, below: str) -> Mapping[str, object]:
    return {
        "driver": "snapshot-access",
        "node-name": f"{ACCESS}{number}",
        "file": below,
        "discard": "unmap",  # or a trim over NBD would do nothing
    }


def _size_lock(number: int, node: str) -> Mapping[str, object]:
    """An export of the recipe's node that nobody reads: while it is there QEMU refuses to resize the disk.

    The node's own bitmaps would shrink with the disk, and the next read of the snapshot would abort QEMU: assertion
    start + count <= hb->orig_size in hbitmap_status (seen with 7.2.22 and 10.0.2).
    """
    name = f"{SIZE}{number}"
    return {"type": "nbd", "id": name, "name": name, "node-name": node, "writable": False}


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
