# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checkpoints of two disks, as the tests of bitmaps make them and look at them."""

import contextlib
import json
from collections.abc import AsyncIterator, Collection
from functools import partial
from pathlib import Path
from typing import Any

import trio

from qfsbackup.contracts import Snapshot, SnapshotDisk
from qfsbackup.facts import Base, CheckpointRequest, Known
from qfsbackup.vm.bitmaps.checkpoint import bitmap_name, low_name
from tests.harness.disk import MIB, Disk
from tests.harness.qemu import Qemu
from tests.harness.vm import Vm, running_vm
from tests.vm.support import Snapshots, make_source, served

OLD, NEW, OTHER = "0" * 15 + "a", "0" * 15 + "b", "0" * 15 + "c"
STORE = "000000"  # the id of the store that all of them are of
SIZE = 16 * MIB


def source(
    vm: Vm,
    folder: Path,
    generation: str,
    base: str | None = None,
    target: str = "nas",
    also_committed: Collection[str] = (),
    also_based: Collection[str] = (),
    **more: Any,
) -> Snapshots:
    """A source that starts a backup, from the backup `base` on all disks if there is one."""
    bases = {disk.id: Base(own(base, disk.id), SIZE, content(disk)) for disk in vm.disks} if base else {}
    bases |= {name: Base(own(base or OLD, name), SIZE) for name in also_based}
    kept = {base.generation for base in bases.values()}

    async def known(_uuid: str | None, _name: str) -> Known:
        return Known(STORE, kept | set(also_committed), bases, partial(own, generation))

    request = CheckpointRequest(target, known)
    return make_source(vm, folder, checkpoint=request, **more)


def own(generation: str, disk: str) -> str:
    """The generation that a disk has of a backup."""
    return f"{generation[:14]}{disk[-1]}{generation[15]}"


def content(disk: Disk) -> str:
    """What a source calls the content of a disk whose image has nothing below."""
    return json.dumps({"format": disk.format, "below": [], "written": [], "file": str(disk.path)})


async def bitmaps(vm: Vm) -> dict[str, dict[str, Any]]:
    """What QEMU says of each bitmap on a guest's node, by `DISK NAME`."""
    nodes = await vm.monitor.execute("query-named-block-nodes", flat=True)
    return {
        f"{Path(node['file']).stem} {bitmap['name']}": bitmap
        for node in nodes
        if node["drv"] in ("raw", "qcow2")
        for bitmap in node.get("dirty-bitmaps", ())
        if "name" in bitmap and not node["node-name"].startswith("qfsbackup-")  # filters have some without a name
    }


async def names(vm: Vm) -> set[str]:
    return set(await bitmaps(vm))


def of(generation: str, target: str = "nas") -> set[str]:
    """The bitmaps of a generation on both disks."""
    return pair("vda", generation, target) | pair("vdb", generation, target)


def pair(disk: str, generation: str, target: str = "nas") -> set[str]:
    """The bitmaps of a generation on one disk."""
    name = bitmap_name(target, own(generation, disk))
    return {f"{disk} {name}", f"{disk} {low_name(name)}"}


async def dirty(disk: SnapshotDisk) -> list[tuple[int, int]]:
    """Offset and length of the dirty extents that NBD tells."""
    export = served(disk)
    assert export.dirty_context is not None
    command = ["nbdinfo", f"--map={export.dirty_context}", "--json", export.uri]
    done = await trio.run_process(command, capture_stdout=True)
    return [(extent["offset"], extent["length"]) for extent in json.loads(done.stdout) if extent["type"]]


async def committed(vm: Vm, folder: Path, generation: str, base: str | None = None) -> Snapshot:
    """Take a snapshot and commit it."""
    async with source(vm, folder, generation, base).snapshot() as snapshot:
        assert snapshot.keep is not None
        await snapshot.keep()
    return snapshot


def said(snapshot: Snapshot) -> list[tuple[str, str | None]]:
    """The bitmaps' status, and what the map is called."""
    return [(disk.bitmap, served(disk).dirty_context) for disk in snapshot.disks]


FULL = ("new", None)
INCREMENTAL = ("reuse", "qemu:dirty-bitmap:qfsbackup-map")


@contextlib.asynccontextmanager
async def two_disks(qemu: Qemu, folder: Path, *, legacy: bool = False, name: str = "vm") -> AsyncIterator[Vm]:
    disks = [Disk("vda", folder / "vda.raw", SIZE, legacy=legacy)]
    disks += [Disk("vdb", folder / "vdb.qcow2", SIZE, format="qcow2", legacy=legacy)]
    async with running_vm(qemu, folder, disks, name=name) as vm:
        yield vm
