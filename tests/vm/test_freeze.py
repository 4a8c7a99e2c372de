# SPDX-License-Identifier: LGPL-2.1-or-later
"""Freezing the guest: the real agent in a real guest, and a fake one for what the real one cannot be made to do."""

from pathlib import Path

import pytest
import trio
import trio.testing

from qfsbackup.errors import UserError
from qfsbackup.vm import freeze as freeze_module
from qfsbackup.vm.agents.agent_socket import AgentSocket
from qfsbackup.vm.cleanup import undo_leftovers
from qfsbackup.vm.monitors.qmp_socket import connect
from qfsbackup.vm.ours import FROZEN
from tests.harness.agent import ask
from tests.harness.qmp_proxy import running_proxy
from tests.harness.vm import Vm
from tests.vm.fake_agent import Guest, fake_agent
from tests.vm.refusing import running_refusing
from tests.vm.support import held, make_source, served


async def status(vm: Vm) -> str:
    """What the guest's agent says about its file systems."""
    assert vm.agent is not None
    async with ask(vm.agent) as agent:
        return str(await agent("guest-fsfreeze-status"))


async def mount_vda(vm: Vm) -> None:
    await vm.shell.run("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt")


async def test_the_guest_is_frozen_at_the_instant_and_thawed_after_it(guest_vm: Vm, tmp_path: Path) -> None:
    await mount_vda(guest_vm)
    await guest_vm.shell.run("echo precious > /mnt/file")  # not synced: freezing writes it to the disk
    frozen_then = []

    async def look(name: str, _arguments: dict[str, object]) -> None:
        if name in ("qom-set", "block-export-add"):
            frozen_then.append((name, "isfrozen" in await guest_vm.shell.run("ls /run/qga")))

    source = make_source(guest_vm, tmp_path, agent=guest_vm.agent, freeze="require", socket=tmp_path / "proxy")
    async with running_proxy(guest_vm.qmp, source.socket, look), source.snapshot() as snapshot:
        assert frozen_then == [("qom-set", True)] * 2 + [("block-export-add", False)] * 4
        assert snapshot.frozen
        assert snapshot.pause_ms == 0  # several disks share an instant without a stop
        assert await status(guest_vm) == "thawed"
        await guest_vm.shell.run("echo later > /mnt/file && sync")
        copy = tmp_path / "copy"
        await trio.run_process(["nbdcopy", served(snapshot.disks[0]).uri, str(copy)])
    shown = await trio.run_process(["debugfs", "-R", "cat file", str(copy)], capture_stdout=True, capture_stderr=True)
    assert shown.stdout == b"precious\n"
    check = await trio.run_process(["e2fsck", "-fn", str(copy)], capture_stdout=True, capture_stderr=True)
    assert b"recovering journal" not in check.stdout + check.stderr


@pytest.mark.one_qemu
async def test_a_freeze_that_is_not_ours_stays(guest_vm: Vm, tmp_path: Path) -> None:
    """Somebody else's stays through a snapshot and through cleanup; that of a dead mount is thawed."""
    await mount_vda(guest_vm)
    assert guest_vm.agent is not None
    async with ask(guest_vm.agent) as agent:
        assert await agent("guest-fsfreeze-freeze") == 1
    async with make_source(guest_vm, tmp_path, agent=guest_vm.agent).snapshot() as snapshot:
        assert not snapshot.frozen
        assert await status(guest_vm) == "frozen"
    with pytest.raises(UserError, match="somebody else"):
        async with make_source(guest_vm, tmp_path, agent=guest_vm.agent, freeze="require").snapshot():
            pytest.fail("was not refused")
    async with connect(guest_vm.qmp, print) as qmp:
        assert await undo_leftovers(qmp, AgentSocket(guest_vm.agent)) == []
        assert await status(guest_vm) == "frozen"
        await guest_vm.monitor.execute("blockdev-add", {"driver": "null-co", "node-name": FROZEN, "size": 0})
        assert "thawed the guest's file systems" in await undo_leftovers(qmp, AgentSocket(guest_vm.agent))
    assert await status(guest_vm) == "thawed"


@pytest.mark.one_qemu
async def test_a_guest_that_cannot_be_frozen(guest_vm: Vm, tmp_path: Path) -> None:
    async with make_source(guest_vm, tmp_path, agent=guest_vm.agent).snapshot() as snapshot:
        assert not snapshot.frozen
        assert snapshot.pause_ms > 0  # so that the disks share an instant all the same
    with pytest.raises(UserError, match="nothing to freeze"):
        async with make_source(guest_vm, tmp_path, agent=guest_vm.agent, freeze="require").snapshot():
            pytest.fail("was not refused")
    assert await status(guest_vm) == "thawed"
    await mount_vda(guest_vm)
    await guest_vm.monitor.execute("stop")
    async with make_source(guest_vm, tmp_path, agent=guest_vm.agent).snapshot() as snapshot:
        assert not snapshot.frozen
    with pytest.raises(UserError, match="not running"):
        async with make_source(guest_vm, tmp_path, agent=guest_vm.agent, freeze="require").snapshot():
            pytest.fail("was not refused")
    await guest_vm.monitor.execute("cont")
    assert await status(guest_vm) == "thawed"


@pytest.mark.one_qemu
async def test_a_snapshot_that_fails_while_the_guest_is_frozen_thaws_it(guest_vm: Vm, tmp_path: Path) -> None:
    await mount_vda(guest_vm)
    before = await held(guest_vm)
    async with running_refusing(guest_vm.qmp, tmp_path / "refusing") as refusing:
        refusing.command("qom-set", 1)
        with pytest.raises(UserError, match="refused by the test"):
            async with make_source(guest_vm, tmp_path, socket=refusing.path, agent=guest_vm.agent).snapshot():
                pytest.fail("was not refused")
    assert refusing.refused == "qom-set"
    assert await status(guest_vm) == "thawed"
    assert await held(guest_vm) == before


@pytest.mark.one_qemu
@pytest.mark.parametrize("stuck", ["query-named-block-nodes", "qom-set"])
async def test_a_guest_is_thawed_in_time_though_qemu_is_stuck(
    paused_vm: Vm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stuck: str
) -> None:
    """Until the guest is thawed QEMU is asked nothing more, and it answers nothing."""
    monkeypatch.setattr(freeze_module, "HOLD_TIMEOUT", 0.5)
    await paused_vm.monitor.execute("cont")
    before = await held(paused_vm)
    guest, meanwhile = Guest(), list[str]()

    async def hang(name: str, _arguments: object, _reply: object) -> None:
        if guest.state == "frozen" and name == stuck:
            frozen_at = trio.current_time()
            meanwhile.append(name)
            await guest.thawed.wait()
            assert trio.current_time() - frozen_at < 1.5

    async def note(name: str, _arguments: object) -> None:
        if meanwhile and guest.state == "frozen":
            meanwhile.append(name)

    async with (
        fake_agent(tmp_path / "agent", guest.answer) as path,
        running_proxy(paused_vm.qmp, tmp_path / "proxy", note, hang) as proxy,
    ):
        with pytest.raises(UserError, match="did not come to rest"):
            async with make_source(paused_vm, tmp_path, socket=proxy.path, agent=path).snapshot():
                pytest.fail("was not refused")
    assert meanwhile == [stuck]
    assert await held(paused_vm) == before


@pytest.mark.one_qemu
async def test_a_cancelled_mount_thaws_before_it_asks_qemu_anything(paused_vm: Vm, tmp_path: Path) -> None:
    await paused_vm.monitor.execute("cont")
    guest, scope = Guest(), trio.CancelScope()

    async def hang(name: str, _arguments: object, _reply: object) -> None:
        if guest.state == "frozen" and name == "qom-set":
            scope.cancel()
            with trio.fail_after(2):
                await guest.thawed.wait()

    async with (
        fake_agent(tmp_path / "agent", guest.answer) as path,
        running_proxy(paused_vm.qmp, tmp_path / "proxy", on_reply=hang) as proxy,
    ):
        with scope:
            async with make_source(paused_vm, tmp_path, socket=proxy.path, agent=path).snapshot():
                pytest.fail("was not cancelled")
    assert guest.thawed.is_set()
