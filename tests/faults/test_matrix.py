# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fault matrix: what happens to the VM, to readers and to the exit status when something goes wrong during a mount.

A row is a fault; the columns are checked in `test_a_fault_during_a_mount` and are the same for all rows. The CPUs run a
BIOS; what takes a guest is in test_guest.py, deaths in the middle of set-up and tear-down are in test_kills.py.
"""

import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.faults.support import ended, nothing_of_ours, reads, said, unmounted, until_eio
from tests.harness.disk import MIB, Disk
from tests.harness.files import make_random
from tests.harness.monitor import QmpError
from tests.harness.mount import PROGRAM, Mount, is_mounted, mounted, qfsbackup, taken_away
from tests.harness.process import running
from tests.harness.qemu import Qemu
from tests.harness.vm import Vm, running_vm
from tests.vm.support import guest_io, held, server_runs

KILLED = 128 + signal.SIGKILL


@dataclass(frozen=True)
class Fault:
    """A row. `happen` returns when it has happened."""

    happen: Callable[[Vm, Mount], Awaitable[None]]
    lives: bool = True  # does QEMU
    readable: bool = True  # are the images, afterwards
    mounted: bool = True  # still
    same: bool = True  # is the VM exactly as before once all is over
    code: int = 0  # exit status of the mount's process
    log: tuple[str, ...] = ()  # what it says


async def quit_qemu(vm: Vm, _: Mount) -> None:
    await vm.monitor.execute("quit")
    await vm.process.wait()


async def kill_qemu(vm: Vm, _: Mount) -> None:
    vm.process.kill()
    await vm.process.wait()


async def reset(vm: Vm, _: Mount) -> None:
    await vm.monitor.execute("system_reset")
    await vm.monitor.event("RESET")


async def stop(vm: Vm, _: Mount) -> None:
    await vm.monitor.execute("stop")
    await vm.monitor.event("STOP")


async def hang_for_a_while(vm: Vm, mount: Mount) -> None:
    """QEMU hangs: a reader waits, the status does not; then all goes on."""
    images = {disk.id: mount.image(disk.id) for disk in vm.disks}
    async with trio.open_nursery() as nursery:
        vm.process.send(signal.SIGSTOP)
        nursery.start_soon(reads, images["vda"])
        with trio.fail_after(5):
            assert (await mount.status())["state"] == "ready"
        vm.process.send(signal.SIGCONT)


async def unplug(vm: Vm, _: Mount) -> None:
    await vm.monitor.execute("device_del", id="sda")
    await vm.monitor.event("DEVICE_DELETED", device="sda")


async def resize(vm: Vm, _: Mount) -> None:
    """QEMU refuses it, as `block_resize` of the device and as that of its node."""
    for target in ({"device": "drive-vdb"}, {"node-name": "vda-node"}):
        for size in (2 * MIB, 8 * MIB):
            with pytest.raises(QmpError, match="resize"):
                await vm.monitor.execute("block_resize", {**target, "size": size})


async def migrate(vm: Vm, _: Mount) -> None:
    """It fails in its last step, for an exported disk cannot be handed over; the VM then runs on here."""
    await vm.monitor.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    await vm.monitor.execute("migrate", uri="exec:cat > /dev/null")
    await vm.monitor.event("MIGRATION", status="failed")
    await vm.monitor.event("RESUME")


async def take_external_snapshot(vm: Vm, mount: Mount) -> None:
    await vm.monitor.execute(
        "blockdev-snapshot-sync",
        {"node-name": "vda-node", "snapshot-file": str(mount.path.parent / "overlay"), "snapshot-node-name": "overlay"},
    )


async def kill(victim: str, _: Vm, mount: Mount) -> None:
    """SIGKILL for a process of the mount; who is left puts all back and ends."""
    worker = await mount.worker()
    async with ended([worker, mount.process.pid]):
        if victim == "worker":
            os.kill(worker, signal.SIGKILL)
        else:
            mount.process.kill()


FAULTS = {
    "QEMU quits": Fault(quit_qemu, lives=False, readable=False, code=2, log=("the VM is gone", "broken")),
    "QEMU is killed": Fault(kill_qemu, lives=False, readable=False, code=2, log=("the VM is gone", "broken")),
    "QEMU hangs for a while": Fault(hang_for_a_while),
    "the guest is reset": Fault(reset),
    "the guest is stopped": Fault(stop, same=False),
    "a disk is unplugged": Fault(unplug, same=False),
    "disks are resized": Fault(resize),
    "a migration is attempted": Fault(migrate),
    "an external snapshot is taken": Fault(take_external_snapshot, same=False),
    "the worker is killed": Fault(partial(kill, "worker"), mounted=False, code=KILLED),
    "the supervisor is killed": Fault(partial(kill, "supervisor"), mounted=False),
}


@contextlib.asynccontextmanager
async def bed(qemu: Qemu, folder: Path) -> AsyncIterator[Vm]:
    """A VM whose CPUs run a BIOS, with disks that are attached in different ways, and a second QMP socket."""
    disks = [
        Disk("vda", make_random(folder / "vda.raw", 4 * MIB, hole_every=4)),
        Disk("vdb", make_random(folder / "vdb.raw", 4 * MIB, seed=2), legacy=True),
        Disk("sda", make_random(folder / "sda.raw", MIB, seed=3), interface="virtio-scsi"),
    ]
    second = ["-qmp", f"unix:{folder / 'second'},server=on,wait=off"]
    async with running_vm(qemu, folder, disks, extra_args=second) as vm:
        await vm.monitor.execute("cont")
        yield vm


@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_during_a_mount(qemu: Qemu, tmp_path: Path, name: str) -> None:
    fault = FAULTS[name]
    async with bed(qemu, tmp_path) as vm:
        before = await held(vm)
        contents = {disk.id: disk.path.read_bytes() for disk in vm.disks if disk.path}
        async with mounted(vm.qmp, tmp_path / "mnt", f"fleece={tmp_path}", expected=(fault.code,)) as mount:
            await guest_io(vm, "vda", "write -P 7 1M 256k")
            await fault.happen(vm, mount)
            if fault.lives:
                await guest_io(vm, "vda", "write -P 8 2M 256k")
            assert is_mounted(mount.path) == fault.mounted
            if fault.mounted:
                for disk, content in contents.items():
                    if fault.readable:
                        assert await reads(mount.image(disk)) == content
                    else:
                        await until_eio(mount.image(disk))
                assert (await mount.status())["state"] == ("ready" if fault.readable else "broken")
                await unmounted(mount.path)
            assert await mount.process.wait() in (fault.code, -signal.SIGKILL)
            assert not is_mounted(mount.path)
            for words in fault.log:
                assert words in mount.process.log
        if fault.lives:
            await nothing_of_ours(vm)
            await guest_io(vm, "vda", "write -P 9 0 64k")
            assert not fault.same or await held(vm) == before
            assert not await server_runs(vm)
        assert vm.process.returncode in ((None,) if fault.lives else (0, -signal.SIGKILL))


async def serve_nbd(vm: Vm, folder: Path) -> None:
    address = {"type": "unix", "data": {"path": str(folder / "theirs")}}
    await vm.monitor.execute("nbd-server-start", {"addr": address})


async def export(vm: Vm, folder: Path) -> None:
    await serve_nbd(vm, folder)
    await vm.monitor.execute("block-export-add", {"type": "nbd", "id": "theirs", "node-name": "vda-node"})


async def back_up(vm: Vm, _: Path) -> None:
    await vm.monitor.execute(
        "blockdev-add", {"driver": "null-co", "node-name": "theirs", "size": 4 * MIB, "read-zeroes": True}
    )
    await vm.monitor.execute(
        "blockdev-backup", {"job-id": "theirs", "device": "vda-node", "target": "theirs", "sync": "none"}
    )


async def mirror(vm: Vm, _: Path) -> None:
    """Its filter, through which it sees the guest's writes, is not to be seen in query-block (QEMU 10.0)."""
    await vm.monitor.execute("blockdev-add", {"driver": "null-co", "node-name": "theirs", "size": 4 * MIB})
    await vm.monitor.execute(
        "blockdev-mirror", {"job-id": "move", "device": "vda-node", "target": "theirs", "sync": "full"}
    )
    await vm.monitor.event("BLOCK_JOB_READY")


async def commit(vm: Vm, folder: Path) -> None:
    """Of an overlay that is in use, into what is below it."""
    overlay = {"node-name": "vda-node", "snapshot-file": str(folder / "overlay"), "snapshot-node-name": "overlay"}
    await vm.monitor.execute("blockdev-snapshot-sync", overlay)
    await vm.monitor.execute("block-commit", {"job-id": "shrink", "device": "overlay"})
    await vm.monitor.event("BLOCK_JOB_READY")


async def stream(vm: Vm, folder: Path) -> None:
    """Of what is below an overlay, so slowly that it does not end."""
    overlay = {"node-name": "vda-node", "snapshot-file": str(folder / "overlay"), "snapshot-node-name": "overlay"}
    await vm.monitor.execute("blockdev-snapshot-sync", overlay)
    await vm.monitor.execute("block-stream", {"job-id": "flatten", "device": "overlay", "speed": 1})


async def nothing(_vm: Vm, _folder: Path) -> None:
    """The options are the fault."""


@dataclass(frozen=True)
class Refusal:
    """What is there already, or what is asked for, and what the person is told; the VM is then as it was."""

    prepare: Callable[[Vm, Path], Awaitable[None]]
    words: str
    options: str = "freeze=off"


REFUSALS = {
    "a foreign NBD server": Refusal(serve_nbd, "NBD server"),
    "a foreign export": Refusal(export, "theirs"),
    "a foreign backup job": Refusal(back_up, "disk vda"),
    "a mirror": Refusal(mirror, "block job of disk vda is running (move)"),
    "a commit": Refusal(commit, "block job of disk vda is running (shrink)"),
    "a stream": Refusal(stream, "block job of disk vda is running (flatten)"),
    "no agent, and it is required": Refusal(nothing, "no agent socket", "freeze=require"),
    "an agent that is absent": Refusal(nothing, "cannot be frozen", "freeze=require,agent=/nonexistent"),
    "no fleecing folder": Refusal(nothing, "no fleecing file", "fleece=/nonexistent"),
}


@pytest.mark.parametrize("name", REFUSALS)
async def test_what_is_refused_leaves_the_vm_as_it_was(qemu: Qemu, tmp_path: Path, name: str) -> None:
    refusal = REFUSALS[name]
    async with bed(qemu, tmp_path) as vm:
        await refusal.prepare(vm, tmp_path)
        before, sizes = await held(vm), {"sizes": None}  # those of files: a job may write on
        mountpoint = tmp_path / "mnt"
        mountpoint.mkdir()
        (await qfsbackup("mount", vm.qmp, mountpoint, "-o", refusal.options)).refused(32, refusal.words)
        assert not is_mounted(mountpoint)
        assert await held(vm) | sizes == before | sizes
        await guest_io(vm, "vda", "write -P 9 0 64k")


async def test_a_second_mount_at_once_is_refused(qemu: Qemu, tmp_path: Path) -> None:
    """By the same socket, and by another one of the same VM."""
    async with bed(qemu, tmp_path) as vm, mounted(vm.qmp, tmp_path / "mnt") as mount:
        during, mountpoint = await held(vm), tmp_path / "second-mnt"
        mountpoint.mkdir()
        (await qfsbackup("mount", vm.qmp, mountpoint)).refused(32, f"is already mounted at {tmp_path / 'mnt'}")
        worker = await mount.worker()
        (await qfsbackup("mount", tmp_path / "second", mountpoint)).refused(32, f"process {worker}")
        (await qfsbackup("cleanup", tmp_path / "second")).refused(32, f"process {worker}")
        assert await held(vm) == during
        assert len(await reads(mount.image("vda"))) == 4 * MIB


@pytest.mark.parametrize("victim", ["run", "its command"])
async def test_a_kill_of_run_or_of_its_command_unmounts(qemu: Qemu, tmp_path: Path, victim: str) -> None:
    async with bed(qemu, tmp_path) as vm:
        before, mountpoint = await held(vm), tmp_path / "mnt"
        mountpoint.mkdir()
        fifo = tmp_path / "pids"
        os.mkfifo(fifo)
        line: list[str | Path] = [PROGRAM, "run", vm.qmp, "--mountpoint", mountpoint, "--", "sh", "-c"]
        script = f"echo $$ > {fifo}; exec sleep 100"
        log = tmp_path / "run.log"
        async with taken_away(mountpoint), running([*line, script], log, expected=[KILLED]) as process:
            command = int(await said(fifo))
            worker = await Mount(mountpoint, process).worker()
            async with ended([worker, process.pid]):
                if victim == "run":
                    process.kill()
                else:
                    os.kill(command, signal.SIGKILL)
            code = await process.wait()
            with contextlib.suppress(ProcessLookupError):
                os.kill(command, signal.SIGKILL)
        assert code == (-signal.SIGKILL if victim == "run" else KILLED)
        assert not is_mounted(mountpoint)
        await nothing_of_ours(vm)
        assert await held(vm) == before
