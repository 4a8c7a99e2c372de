# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest that writes and verifies its own pattern lives through one fault after the other, in a single boot.

After each: it runs, is thawed, writes on, and QEMU is as it was. At the end not one write has failed or hung, and its
file system is clean. Then the guest itself crashes, and is shut down, while it is mounted.
"""

import contextlib
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.e2e.support import left_as_it_was
from tests.faults.support import (
    ended,
    kill_at_once,
    mounted_at,
    mounter,
    parent,
    reads,
    unmounted,
    until,
    until_eio,
)
from tests.harness.agent import ask
from tests.harness.disk import MIB, Disk
from tests.harness.mount import Mount, command, is_mounted, mounted, qfsbackup
from tests.harness.qemu import Qemu
from tests.harness.qmp_proxy import running_proxy
from tests.harness.shell import writing
from tests.harness.vm import BOOT_TIMEOUT, Vm, running_vm
from tests.vm.support import held

SIZE = 32 * MIB
LONGEST_WRITE = 45.0  # seconds: cbw-timeout


@dataclass
class Bed:
    """The guest; `hook` is called with each QMP command that the product sends to `socket`."""

    vm: Vm
    folder: Path
    socket: Path
    hook: Callable[[str], Awaitable[None]] | None = None
    passed: list[str] = field(default_factory=list)

    async def on_command(self, name: str, _arguments: dict[str, Any]) -> None:
        """For the QMP proxy."""
        if self.hook:
            await self.hook(name)

    def once(self, name: str, action: Callable[[], Awaitable[None]]) -> None:
        """Let `action` run when the next command of this name is on its way."""

        async def hook(got: str) -> None:
            if got == name:
                self.hook = None
                await action()

        self.hook = hook


async def worker_of(bed: Bed) -> int:
    """The process whose mark is in QEMU."""
    nodes = await bed.vm.monitor.execute("query-named-block-nodes", flat=True)
    [mark] = [node["node-name"] for node in nodes if node["node-name"].startswith("qfsbackup-by-")]
    return int(mark.split("-")[2], 16)


async def fsfreeze_status(vm: Vm) -> str:
    """What the agent says."""
    assert vm.agent is not None
    async with ask(vm.agent) as agent:
        return str(await agent("guest-fsfreeze-status"))


async def an_ordinary_mount(bed: Bed) -> None:
    """Frozen for a moment."""
    async with mounted(bed.socket, bed.folder / "ordinary", f"fleece={bed.folder},agent={bed.vm.agent}") as mount:
        assert (await mount.json("vm.json"))["frozen"]
        await reads(mount.image("vdb"))


async def killed_in_the_middle(bed: Bed, at: str, *, both: bool, options: str) -> None:
    """Mount, and kill the worker, or both processes, when the command `at` is on its way."""
    pids: list[int] = []

    async def kill() -> None:
        worker = await worker_of(bed)
        pids.extend([worker, parent(worker)])
        victims = pids if both else pids[:1]
        async with ended(victims):
            kill_at_once(victims)

    bed.once(at, kill)
    async with mounter(bed.folder / f"killed-{both}") as mounting:
        error = await mounting.mount(bed.socket, bed.folder / f"killed-{both}", options)
        assert error is not None
        assert pids


async def a_worker_killed_while_the_guest_is_frozen(bed: Bed) -> None:
    """The supervisor thaws it."""
    options = f"fleece={bed.folder},agent={bed.vm.agent},freeze=require"
    await killed_in_the_middle(bed, "qom-set", both=False, options=options)


async def both_killed_while_the_guest_is_stopped(bed: Bed) -> None:
    """`qfsbackup cleanup` lets it run on."""
    await killed_in_the_middle(bed, "qom-set", both=True, options=f"fleece={bed.folder},freeze=off")
    assert (await bed.vm.monitor.execute("query-status"))["status"] == "paused"
    assert (await qfsbackup("cleanup", bed.socket)).code == 0


async def an_agent_that_dies_while_the_guest_is_frozen(bed: Bed) -> None:
    """Its successor is asked to thaw."""

    async def kill() -> None:
        await bed.vm.shell.run("kill -9 $(pidof qemu-ga)")

    bed.once("qom-set", kill)
    options = f"fleece={bed.folder},agent={bed.vm.agent},freeze=auto"
    async with mounted(bed.socket, bed.folder / "dying-agent", options) as mount:
        await reads(mount.image("vdb"))


async def a_killed_worker(bed: Bed) -> None:
    """While it is being read."""
    async with mounted(bed.socket, bed.folder / "killed", f"fleece={bed.folder}", expected=[128 + 9]) as mount:
        await reads(mount.image("vda"))
        worker = await mount.worker()
        async with ended([worker, mount.process.pid]):
            os.kill(worker, signal.SIGKILL)


async def a_killed_supervisor(bed: Bed) -> None:
    """The worker ends in order."""
    async with mounted(bed.socket, bed.folder / "orphan", f"fleece={bed.folder}", expected=[-9]) as mount:
        await reads(mount.image("vda"))
        worker = await mount.worker()
        async with ended([worker, mount.process.pid]):
            mount.process.kill()


async def a_qemu_that_hangs_for_a_while(bed: Bed) -> None:
    """Nobody's fault, and nobody's loss."""
    async with mounted(bed.socket, bed.folder / "hung", f"fleece={bed.folder}") as mount:
        bed.vm.process.send(signal.SIGSTOP)
        try:
            with trio.fail_after(5):
                assert (await mount.status())["state"] == "ready"
        finally:
            bed.vm.process.send(signal.SIGCONT)
        await reads(mount.image("vdb"))


async def a_full_fleecing_store(bed: Bed) -> None:
    """The guest fills it."""
    async with (
        mounted_at(bed.folder / "fleece", "-t", "tmpfs", "-o", "size=3M", "none") as fleece,
        mounted(bed.socket, bed.folder / "full", f"fleece={fleece}", expected=[2]) as mount,
    ):

        async def broken() -> bool:
            return bool((await mount.status())["broken"])

        await until(broken, timeout=60)
        await until_eio(mount.image("vda"))


async def a_migration(bed: Bed) -> None:
    """It fails in its last step."""
    run = bed.vm.monitor.execute
    await run("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    async with mounted(bed.socket, bed.folder / "migrated", f"fleece={bed.folder}") as mount:
        await run("migrate-set-parameters", {"max-bandwidth": 1 << 30})
        await run("migrate", uri="exec:cat > /dev/null")
        await bed.vm.monitor.event("MIGRATION", status="failed", timeout=60)
        await bed.vm.monitor.event("RESUME")
        await reads(mount.image("vdb"))


FAULTS = [
    an_ordinary_mount,
    a_worker_killed_while_the_guest_is_frozen,
    both_killed_while_the_guest_is_stopped,
    an_agent_that_dies_while_the_guest_is_frozen,
    a_killed_worker,
    a_killed_supervisor,
    a_qemu_that_hangs_for_a_while,
    a_full_fleecing_store,
    a_migration,
]


async def writes_on(vm: Vm) -> None:
    """The guest completes more writes on both disks. (The 5th field counts them, Documentation/block/stat.rst.)"""

    async def counts() -> list[int]:
        lines = await vm.shell.run("cat /sys/block/vda/stat /sys/block/vdb/stat")
        return [int(line.split()[4]) for line in lines.splitlines()]

    before = await counts()

    async def grown() -> bool:
        return all(now > then for now, then in zip(await counts(), before, strict=True))

    await until(grown)


async def crash(vm: Vm) -> None:
    """The kernel panics, and the guest boots again."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(vm.monitor.event, "RESET")
        with trio.move_on_after(1):  # there is no answer
            await vm.shell.run("echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger")
    await vm.shell.ready(BOOT_TIMEOUT)


@pytest.mark.timeout(300)
async def test_a_guest_lives_through_all_of_it(qemu: Qemu, tmp_path: Path) -> None:
    disks = [Disk("vda", tmp_path / "vda.raw", SIZE), Disk("vdb", tmp_path / "vdb.raw", SIZE, legacy=True)]
    async with running_vm(qemu, tmp_path, disks, guest=True, agent=True) as vm:
        await vm.shell.run("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt")
        await vm.shell.run("dd if=/dev/zero of=/mnt/file bs=1M count=8 && sync")
        bed = Bed(vm, tmp_path, tmp_path / "proxy")
        async with running_proxy(vm.qmp, bed.socket, bed.on_command), writing(vm.shell, "/mnt/file /dev/vdb") as writes:
            for fault in FAULTS:
                async with left_as_it_was(vm):
                    await fault(bed)
                assert (await held(vm))["status"] == "running", fault.__name__
                assert await fsfreeze_status(vm) == "thawed", fault.__name__
                await writes_on(vm)
        writes.check()
        assert writes.verified > 0
        assert writes.max_us < LONGEST_WRITE * 1e6
        await vm.shell.run("umount /mnt")
        await it_crashes_and_is_shut_down(vm, tmp_path)
    assert (await command("e2fsck", "-fn", tmp_path / "vda.raw")).code == 0


async def it_crashes_and_is_shut_down(vm: Vm, folder: Path) -> None:
    """Both during a mount. A crash is no end of the VM, a shutdown is."""
    async with mounted(vm.qmp, folder / "crash", f"fleece={folder}", expected=[2]) as mount:
        content = await reads(mount.image("vdb"))
        await crash(vm)
        assert await reads(mount.image("vdb")) == content
        with contextlib.suppress(EOFError):
            await vm.shell.run("poweroff -f")
        assert await vm.process.wait() == 0
        await gone(mount)


async def gone(mount: Mount) -> None:
    """Reads are errors within a second, and the mount still answers and can be unmounted."""
    await until_eio(mount.image("vda"))
    status = await mount.status()
    assert status["vm_gone"]
    assert status["state"] == "broken"
    await unmounted(mount.path)
    assert await mount.process.wait() == 2
    assert not is_mounted(mount.path)
