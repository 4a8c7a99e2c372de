# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tests of whole mounts share: a VM that runs without a guest, what belongs to a mount outside of QEMU."""

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

from tests.harness.disk import MIB, Disk
from tests.harness.mount import taken_away
from tests.harness.qemu import Qemu
from tests.harness.vm import Vm, running_vm
from tests.vm.support import guest_io, held, server_runs

RUNTIME = Path("/run/qfsbackup")


@contextlib.asynccontextmanager
async def idle_vm(qemu: Qemu, folder: Path) -> AsyncIterator[Vm]:
    """A VM whose CPUs run its BIOS, with a raw and a qcow2 disk of 4 MiB, a bitmap and an fdset that are not ours.

    Whatever a test leaves mounted at `folder / "mnt"` is taken away.
    """
    disks = [Disk("vda", folder / "vda.raw", 4 * MIB), Disk("vdb", folder / "vdb.qcow2", 4 * MIB, format="qcow2")]
    async with running_vm(qemu, folder, disks) as vm, taken_away(folder / "mnt", vm.qmp):
        await vm.monitor.execute("block-dirty-bitmap-add", node="vdb-node", name="foreign")
        with (folder / "foreign").open("wb") as file:
            await vm.monitor.pass_fd(file.fileno())
            await vm.monitor.execute("add-fd", fdset_id=77, opaque="foreign")
        await vm.monitor.execute("cont")
        await overwrite(vm)  # the foreign bitmap must not change by what is written again
        yield vm


@contextlib.asynccontextmanager
async def left_as_it_was(vm: Vm) -> AsyncIterator[None]:
    """After the block QEMU must hold exactly what it held before, and its NBD server must not run."""
    before = await held(vm)
    yield
    after = await held(vm)
    changed = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
    assert not changed, f"QEMU had, and has now: {changed}"
    assert not await server_runs(vm), "QEMU's NBD server still runs"


async def overwrite(vm: Vm) -> None:
    """What a guest does meanwhile, on both disks of `idle_vm`."""
    await guest_io(vm, "vda", "write -P 7 1M 256k")
    await guest_io(vm, "vdb", "write -P 7 0 64k")


def runtime_folder(vm: Vm) -> Path:
    """The folder of the mount that this VM serves: the one with the socket on which QEMU listens for NBD."""
    inodes = {link for entry in Path(f"/proc/{vm.pid}/fd").iterdir() if (link := _link(entry)).startswith("socket:")}
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and f"socket:[{fields[6]}]" in inodes and fields[7].startswith(str(RUNTIME)):
            return Path(fields[7]).parent
    raise LookupError("QEMU listens on no socket of ours")


def _link(entry: Path) -> str:
    try:
        return os.readlink(entry)  # noqa: PTH115 - these are no paths
    except FileNotFoundError:
        return ""
