# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who stops the guest's CPUs, and who lets them run on: us, the VM's owner, or both in any order."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from qfsbackup.errors import UserError
from tests.harness.qmp_proxy import running_proxy
from tests.harness.vm import Vm
from tests.vm.support import held, make_source
from tests.vm.test_cleanup import clean, mount_process


@pytest.fixture
async def running_vm(paused_vm: Vm) -> Vm:
    """The CPUs run a BIOS."""
    await paused_vm.monitor.execute("cont")
    return paused_vm


class Owner:
    """Has the VM do something while a command of the product is on its way, once."""

    def __init__(self, vm: Vm, at: str, does: Sequence[str]) -> None:
        self.vm, self.at, self.does = vm, at, does

    async def __call__(self, name: str, _arguments: dict[str, Any]) -> None:
        """For the proxy."""
        if name == self.at:
            does, self.does = self.does, ()
            for command in does:
                await self.vm.monitor.execute(command)


@pytest.mark.parametrize("at", ["stop", "qom-set"], ids=["before ours", "after ours"])
async def test_a_vm_that_its_owner_pauses_together_with_us_stays_paused(
    running_vm: Vm, tmp_path: Path, at: str, caplog: pytest.LogCaptureFixture
) -> None:
    owner = Owner(running_vm, at, ["stop"])
    source = make_source(running_vm, tmp_path, socket=tmp_path / "proxy")
    async with running_proxy(running_vm.qmp, source.socket, owner), source.snapshot():
        assert (await held(running_vm))["status"] == "paused"
    assert (await held(running_vm))["status"] == "paused"
    assert "the VM stays paused" in caplog.text


@pytest.mark.parametrize(
    ("does", "status"), [(["cont"], "running"), (["cont", "stop"], "paused")], ids=["cont", "cont and stop"]
)
async def test_a_pause_that_the_owner_ends_is_none_and_his_will_stands(
    running_vm: Vm, tmp_path: Path, does: list[str], status: str
) -> None:
    before = await held(running_vm)
    owner = Owner(running_vm, "qom-set", does)
    source = make_source(running_vm, tmp_path, socket=tmp_path / "proxy")
    async with running_proxy(running_vm.qmp, source.socket, owner):
        with pytest.raises(UserError, match="let the VM run on"):
            async with source.snapshot():
                pytest.fail("was not refused")
    after = await held(running_vm)
    assert after["status"] == status
    assert after["nodes"] == before["nodes"]


async def test_without_anybody_else_the_guest_runs_on_and_qemu_complains_of_nothing(
    running_vm: Vm, tmp_path: Path
) -> None:
    async with make_source(running_vm, tmp_path).snapshot() as snapshot:
        assert snapshot.pause_ms > 0
        assert (await held(running_vm))["status"] == "running"
    assert "failed" not in running_vm.process.log


@pytest.mark.parametrize("owner_pauses", [False, True])
async def test_a_guest_stopped_by_a_mount_that_died(running_vm: Vm, tmp_path: Path, owner_pauses: bool) -> None:
    before = await held(running_vm)
    stopped = trio.Event()

    async def hold(name: str, _arguments: object) -> None:
        if name == "qom-set":
            stopped.set()
            await trio.sleep_forever()

    async with (
        running_proxy(running_vm.qmp, tmp_path / "proxy", hold),
        mount_process(tmp_path / "proxy", tmp_path) as process,
    ):
        await stopped.wait()
        process.kill()
        await process.wait()
    assert (await held(running_vm))["status"] == "paused"
    if owner_pauses:
        await running_vm.monitor.execute("stop")
    assert ("let the guest run on" in await clean(running_vm)) == (not owner_pauses)
    after = await held(running_vm)
    assert after["status"] == ("paused" if owner_pauses else "running")
    assert after["nodes"] == before["nodes"]
