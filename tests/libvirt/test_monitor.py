# SPDX-License-Identifier: LGPL-2.1-or-later
"""QMP through libvirt: what QEMU says, what libvirt says, and what becomes of commands when either is away."""

import os
import signal
import tempfile
from pathlib import Path

import pytest
import trio

from qfsbackup.errors import UserError
from qfsbackup.vm.look.graph import look
from qfsbackup.vm.monitor import QmpGoneError, QmpRefusedError, QmpTimeoutError
from qfsbackup.vm.monitors.libvirt import connect
from tests.harness.disk import MIB
from tests.harness.libvirt import Domain, Libvirt
from tests.libvirt.conftest import distribution


def ignore(_reason: str) -> None:
    """For monitors whose end is no news."""


async def refusal(host: Libvirt, name: str) -> UserError:
    """The error of connecting to a domain."""
    with pytest.raises(UserError) as caught:
        async with connect(host.uri, name, ignore):
            pytest.fail("was not refused")
    return caught.value


async def test_qemus_answers_and_its_refusals(paused: Domain) -> None:
    async with connect(paused.host.uri, paused.name, ignore) as monitor:
        assert monitor.peer_pid == paused.pid
        assert (await monitor.execute("query-status"))["status"] == "prelaunch"
        with pytest.raises(QmpRefusedError) as caught:
            await monitor.execute("no-such-command")
        assert caught.value.error_class == "CommandNotFound"
        with pytest.raises(QmpRefusedError, match="no-such"):
            await monitor.execute("block-dirty-bitmap-add", {"node": "no-such", "name": "x"})


async def test_a_descriptor_is_passed_and_stays_ours(paused: Domain) -> None:
    async with connect(paused.host.uri, paused.name, ignore) as monitor:
        with tempfile.TemporaryFile() as file:
            added = await monitor.execute_with_fd("add-fd", {"opaque": "ours"}, file.fileno())
            file.write(b"still open")
        sets = await paused.qmp("query-fdsets")
        assert (added["fdset-id"], "ours") in [(one["fdset-id"], one["fds"][0]["opaque"]) for one in sets]
        await monitor.execute("remove-fd", {"fdset-id": added["fdset-id"]})


async def test_what_happened_before_an_answer_was_heard(paused: Domain) -> None:
    async with connect(paused.host.uri, paused.name, ignore) as monitor:
        for _ in range(30):
            async with monitor.listen("STOP") as stopped:
                await monitor.execute("cont")
                assert not stopped.any()
                await monitor.execute("stop")
                assert stopped.any()
                assert await stopped() == {}


async def test_what_is_not_there(host: Libvirt, paused: Domain) -> None:
    error = await refusal(host, "other")
    assert "other does not run" in error.what
    await paused.virsh("destroy")
    assert "is shut off" in (await refusal(host, paused.name)).what
    await host.stop()
    error = await refusal(host, paused.name)
    assert "Failed to connect" in error.what
    assert "virsh list" in error.hint


async def test_the_domains_end_is_told_at_once(paused: Domain) -> None:
    heard = trio.Event()
    async with connect(paused.host.uri, paused.name, lambda _reason: heard.set()) as monitor:
        await paused.virsh("destroy")
        with trio.fail_after(5):
            await heard.wait()
        with pytest.raises(QmpGoneError, match="shut off"):
            await monitor.execute("query-status")


async def test_a_qemu_that_was_killed(paused: Domain) -> None:
    heard = trio.Event()
    async with connect(paused.host.uri, paused.name, lambda _reason: heard.set()) as monitor:
        os.kill(paused.pid, signal.SIGKILL)
        with trio.fail_after(5):
            await heard.wait()
        with pytest.raises(QmpGoneError):
            await monitor.execute("query-status")


async def test_libvirtd_restarted_between_two_commands(paused: Domain) -> None:
    async with connect(paused.host.uri, paused.name, pytest.fail) as monitor:
        await paused.host.stop(signal.SIGKILL)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(paused.host.start)
            assert (await monitor.execute("query-status"))["status"] == "prelaunch"
        async with monitor.listen("RESUME") as resumed:  # and its events come again
            await monitor.execute("cont")
            assert resumed.any()


async def test_libvirtd_that_stays_away(paused: Domain) -> None:
    async with connect(paused.host.uri, paused.name, pytest.fail) as monitor:
        await paused.host.stop(signal.SIGKILL)
        with pytest.raises(QmpTimeoutError):
            await monitor.execute("query-status", timeout=0.5)
        assert monitor.hung


async def test_a_domain_that_ended_while_libvirtd_was_away(paused: Domain) -> None:
    heard = trio.Event()
    async with connect(paused.host.uri, paused.name, lambda _reason: heard.set()) as monitor:
        await paused.host.stop(signal.SIGKILL)
        os.kill(paused.pid, signal.SIGKILL)
        await paused.host.start()
        with trio.fail_after(10):
            await heard.wait()
        with pytest.raises(QmpGoneError):
            await monitor.execute("query-status")


async def test_nothing_is_sent_after_a_command_that_is_not_answered_until_it_is(paused: Domain) -> None:
    async with connect(paused.host.uri, paused.name, ignore) as monitor:
        pid = paused.pid
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(QmpTimeoutError):
            await monitor.execute("query-status", timeout=0.3)
        assert monitor.hung
        with pytest.raises(QmpTimeoutError):
            await monitor.execute("cont")
        os.kill(pid, signal.SIGCONT)
        with trio.fail_after(5):
            while True:
                try:
                    assert (await monitor.execute("query-status"))["status"] == "prelaunch"
                    break
                except QmpTimeoutError:
                    continue
        assert not monitor.hung


async def test_a_qemu_that_hangs_is_refused_soon(paused: Domain) -> None:
    pid = paused.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        assert "does not answer" in (await refusal(paused.host, paused.name)).what
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_disks_are_called_by_their_targets(paused: Domain, tmp_path: Path) -> None:
    async with connect(paused.host.uri, paused.name, ignore) as monitor:
        assert sorted(disk.name for disk in (await look(monitor)).disks) == ["sda", "vda", "vdb"]
        (tmp_path / "more.raw").write_bytes(bytes(MIB))
        await paused.virsh("attach-disk", tmp_path / "more.raw", "sdc", "--targetbus", "scsi")
        assert sorted(disk.name for disk in (await look(monitor)).disks) == ["sda", "sdc", "vda", "vdb"]


async def test_the_xml_is_kept_without_secrets(host: Libvirt, tmp_path: Path) -> None:
    more = "<graphics type='vnc' passwd='s3cret'/>"
    async with host.domain(distribution(), tmp_path, [], devices=more) as domain:
        async with connect(host.uri, domain.name, ignore) as monitor:
            config = await monitor.config()
        assert "s3cret" in await domain.virsh("dumpxml", "--security-info")
    assert set(config) == {"domain.xml", "domain-live.xml"}
    assert not any(b"s3cret" in content for content in config.values())
    assert b"<alias" in config["domain-live.xml"]
    assert b"<alias" not in config["domain.xml"]
