# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the recipe of block jobs has of its own; what it owes as every recipe does: test_recipes."""

from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trio

from qfsbackup.errors import UserError
from qfsbackup.vm.cleanup import undo_leftovers
from qfsbackup.vm.monitors.qmp_socket import connect
from qfsbackup.vm.ours import JOB
from tests.e2e.support import idle_vm
from tests.faults.stores import hanging_store
from tests.faults.support import looks, reads, unmounted, until, until_eio
from tests.harness.disk import MIB
from tests.harness.files import allocated
from tests.harness.mount import aside, mounted
from tests.harness.qemu import Qemu
from tests.harness.qmp_proxy import OnReply, running_proxy
from tests.harness.vm import Vm
from tests.vm.support import copied, guest_io, held, make_source
from tests.vm.test_recipes import backup, end_backup

pytestmark = [pytest.mark.newest_too, pytest.mark.recipes("jobs")]


async def clean(vm: Vm) -> None:
    async with connect(vm.qmp, print) as qmp:
        await undo_leftovers(qmp)


async def test_a_mount_that_dies_at_any_command_is_undone(paused_vm: Vm, tmp_path: Path, recipe: str) -> None:
    """As QEMU sees it: its connection is gone, and what it had asked for last is done. After looks it is as before."""
    await paused_vm.monitor.execute("cont")
    before, numbers = await held(paused_vm), count()
    for number in numbers:
        made, complete = make_source(paused_vm, tmp_path, socket=tmp_path / "proxy", recipe=recipe), False
        async with running_proxy(paused_vm.qmp, made.socket, on_reply=drop_after(number)) as proxy:
            with suppress(UserError):
                async with made.snapshot():
                    complete = True
        made.socket.unlink()
        await clean(paused_vm)
        assert await held(paused_vm) == before, proxy.names[-1:]
        if complete and made.status.vm_gone is None:
            break
    assert next(numbers) > 20


def drop_after(number: int) -> OnReply:
    """A hook for the QMP proxy: so many commands that change something are answered."""
    passed = 0

    async def hook(name: str, _arguments: dict[str, Any], _reply: dict[str, Any]) -> None:
        nonlocal passed
        passed += not looks(name)
        await trio.lowlevel.checkpoint()
        if passed > number:
            raise ConnectionResetError

    return hook


async def test_jobs_have_all_disks_at_one_instant_while_the_guest_goes_on_writing(
    paused_vm: Vm, tmp_path: Path, recipe: str
) -> None:
    """It writes a number to one disk, then to the other, for as long as the mount takes: both never differ by more."""
    await paused_vm.monitor.execute("cont")
    written = 0

    async def write() -> None:
        nonlocal written
        while True:
            written = written % 250 + 1
            for name in ("vda", "vdb"):
                await guest_io(paused_vm, name, f"write -P {written} 0 512")

    async with running_proxy(paused_vm.qmp, tmp_path / "proxy") as proxy, trio.open_nursery() as nursery:
        nursery.start_soon(write)
        async with make_source(paused_vm, tmp_path, socket=proxy.path, recipe=recipe).snapshot() as snapshot:
            assert snapshot.pause_ms == 0
            vda, vdb = [(await copied(disk, tmp_path / "copy"))[0] for disk in snapshot.disks]
            assert vda - vdb in (0, 1, -249)
            assert written not in (vda, vdb)
        nursery.cancel_scope.cancel()
    assert not {"stop", "cont", "qom-set"} & set(proxy.names)


async def test_a_job_that_somebody_ends_breaks_the_snapshot_at_once(paused_vm: Vm, tmp_path: Path, recipe: str) -> None:
    """A backup of his would give its own instant to what is left of ours."""
    before, run = await held(paused_vm), paused_vm.monitor.execute
    async with mounted(paused_vm.qmp, tmp_path / "mnt", f"recipe={recipe}", expected=(2,)) as mount:
        assert (await mount.json("vm.json"))["recipe"] == recipe
        await run("job-pause", id=f"{JOB}0")
        assert await reads(mount.image("vda")) == bytes(16 * MIB)
        await run("job-cancel", id=f"{JOB}0")

        async def broken() -> bool:
            return bool((await mount.status())["broken"])

        await until(broken, timeout=1)  # before anything is read, and sooner than anybody asks
        assert (await mount.status())["broken"] == f"somebody has ended the block job {JOB}0"
        await backup(paused_vm, "vda-node", tmp_path)
        await until_eio(mount.image("vda"))
        await unmounted(mount.path)
        assert await mount.process.wait() == 2
    await end_backup(paused_vm)
    assert await held(paused_vm) == before


async def test_a_store_that_hangs_holds_a_write_up_until_it_answers_and_nothing_else(
    qemu: Qemu, tmp_path: Path, recipe: str
) -> None:
    """Why filters are the default: nothing ends this wait. QEMU itself answers meanwhile."""
    async with hanging_store(tmp_path) as store, idle_vm(qemu, tmp_path) as vm:
        before, run = await held(vm), vm.monitor.execute
        await guest_io(vm, "vda", "write -P 5 0 64k")
        made = make_source(vm, tmp_path, fleece=store.path, recipe=recipe)
        async with made.snapshot() as snapshot:
            await guest_io(vm, "vda", "write -P 6 0 64k")
            store.stop()
            line = 'qemu-io -d /machine/peripheral/vda/virtio-backend "aio_write -P 7 1M 64k"'
            await run("human-monitor-command", {"command-line": line})
            written = "wrote 65536/65536 bytes at offset 1048576"
            for _ in range(5):
                assert (await run("query-status"))["running"]
                assert written not in vm.process.log
            store.go_on()

            async def is_written() -> bool:
                return written in vm.process.log

            await until(is_written)
            shown = await copied(snapshot.disks[0], tmp_path / "copy")
            assert shown[:65536] == b"\x05" * 65536
            assert not made.status.health.broken
            await aside((store.path / "it-answers").touch)  # or, on a busy machine, QEMU would be left alone for now
        assert await held(vm) == before


async def test_what_the_guest_trims_meanwhile_stays_allocated(paused_vm: Vm, tmp_path: Path, recipe: str) -> None:
    """And as it was, so that it need not be copied."""
    await guest_io(paused_vm, "vda", "write -P 8 0 4M")
    async with make_source(paused_vm, tmp_path, recipe=recipe).snapshot() as snapshot:
        await guest_io(paused_vm, "vda", "discard 0 4M")
        assert allocated(tmp_path / "vda.raw") == 4 * MIB
        assert await copied(snapshot.disks[0], tmp_path / "copy") == b"\x08" * 4 * MIB + bytes(12 * MIB)
    await guest_io(paused_vm, "vda", "discard 0 4M")
    assert allocated(tmp_path / "vda.raw") == 0
