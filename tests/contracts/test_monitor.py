# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every Monitor promises (vm/monitor.py), with a real QEMU behind it. A new one is a line in MONITORS."""

import os
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from qfsbackup.vm.monitor import COMMAND_TIMEOUT, Monitor, QmpGoneError, QmpRefusedError, QmpTimeoutError
from qfsbackup.vm.monitors import qmp_socket
from qfsbackup.vm.owner import owned
from tests.harness.bursts import bursts
from tests.harness.libvirt import libvirt
from tests.harness.qemu import Qemu, available, selected
from tests.harness.vm import running_vm


@dataclass(frozen=True)
class Bed:
    """A paused VM without disks: how to open the monitor, and to see and to hurt the VM without it."""

    connect: Callable[[Callable[[str], None]], AbstractAsyncContextManager[Monitor]]
    pid: int
    send: Callable[[signal.Signals], None]
    ask: Callable[[str], Awaitable[Any]]


Connect = Callable[[Path, Callable[[str], None]], AbstractAsyncContextManager[Monitor]]


@asynccontextmanager
async def by_socket(connect: Connect, qemu: Qemu, folder: Path) -> AsyncIterator[Bed]:
    """A QMP socket of QEMU's own."""
    async with running_vm(qemu, folder, []) as vm:
        yield Bed(partial(connect, vm.qmp), vm.pid, vm.process.send, vm.monitor.execute)


@asynccontextmanager
async def by_libvirt(folder: Path) -> AsyncIterator[Bed]:
    """libvirt's passthrough."""
    from qfsbackup.vm.monitors.libvirt import connect  # where libvirt is installed only

    async with libvirt(folder) as host, host.domain(available()[0], folder, []) as domain:
        pid = domain.pid
        yield Bed(partial(connect, host.uri, domain.name), pid, partial(os.kill, pid), domain.qmp)


MONITORS: dict[str, Callable[[Path], AbstractAsyncContextManager[Bed]]] = {
    **{f"socket-{qemu}": partial(by_socket, qmp_socket.connect, qemu) for qemu in selected()},
    "bursts": partial(by_socket, bursts, selected()[-1]),
    "libvirt": by_libvirt,
}


@pytest.fixture(params=MONITORS)
async def bed(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bed]:
    """One of them."""
    async with MONITORS[request.param](tmp_path) as bed:
        yield bed


async def test_a_command_is_answered_or_refused_as_qemu_says(bed: Bed) -> None:
    async with bed.connect(pytest.fail) as qmp:
        assert qmp.peer_pid == bed.pid
        assert (await qmp.execute("query-status"))["status"] == "prelaunch"
        with pytest.raises(QmpRefusedError) as caught:
            await qmp.execute("no-such-command")
        assert caught.value.error_class == "CommandNotFound"
        with pytest.raises(QmpRefusedError, match="no-such-node"):
            await qmp.execute("blockdev-del", {"node-name": "no-such-node"})
        assert (qmp.gone, qmp.hung, qmp.is_left) == (None, False, False)


async def test_commands_of_several_tasks_get_their_own_answers_and_descriptors(bed: Bed, tmp_path: Path) -> None:
    async with bed.connect(pytest.fail) as qmp, qmp.one_connection():
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(_add_and_ask, qmp, tmp_path / str(number))
        there = {fd.get("opaque") for one in await bed.ask("query-fdsets") for fd in one["fds"]}
        assert there >= set(map(str, range(8)))


async def _add_and_ask(qmp: Monitor, path: Path) -> None:
    with path.open("w") as file:
        added = await qmp.execute_with_fd("add-fd", {"opaque": path.name}, file.fileno())
        file.write("still open here")
    [held] = [fd for one in await qmp.execute("query-fdsets") for fd in one["fds"] if fd["opaque"] == path.name]
    opened = await trio.Path(f"/proc/{qmp.peer_pid}/fd/{added['fd']}").readlink()
    assert (held["fd"], opened.name) == (added["fd"], path.name)


async def test_a_descriptor_lives_until_the_command_that_takes_it(bed: Bed) -> None:
    async with bed.connect(pytest.fail) as qmp:
        async with owned(qmp):
            assert "qfsbackup-alive" in [one["label"] for one in await bed.ask("query-chardev")]
        assert "qfsbackup-alive" not in [one["label"] for one in await bed.ask("query-chardev")]


async def test_an_event_is_heard_by_the_answer_to_what_caused_it_and_no_earlier_one(bed: Bed) -> None:
    async with bed.connect(pytest.fail) as qmp:
        await qmp.execute("cont")
        async with qmp.listen("RESUME") as resumed, qmp.listen("STOP") as stopped:
            assert not stopped.any()
            await qmp.execute("stop")
            assert stopped.any()
            assert not resumed.any()
            assert await stopped() == {}
            async with trio.open_nursery() as nursery:
                nursery.start_soon(qmp.execute, "cont")
                with trio.fail_after(5):
                    assert await resumed() == {}


async def test_the_end_of_qemu_is_told_at_once_and_once(bed: Bed) -> None:
    heard, reasons = trio.Event(), []

    def gone(reason: str) -> None:
        reasons.append(reason)
        heard.set()

    async with bed.connect(gone) as qmp:
        bed.send(signal.SIGKILL)
        with trio.fail_after(5):
            await heard.wait()
        for ask in (partial(qmp.execute, "query-status"), partial(qmp.execute_with_fd, "add-fd", {}, 0)):
            with pytest.raises(QmpGoneError):
                await ask()
        assert qmp.gone == reasons[0]
    assert len(reasons) == 1


async def test_a_qemu_that_hangs_delays_nobody_for_long_and_its_late_answers_are_nobodys(bed: Bed) -> None:
    async with bed.connect(pytest.fail) as qmp:
        bed.send(signal.SIGSTOP)
        with pytest.raises(QmpTimeoutError):
            await qmp.execute("query-version", timeout=0.5)
        assert qmp.hung
        with tempfile.TemporaryFile() as file, trio.fail_after(COMMAND_TIMEOUT / 4):
            for _ in range(3):
                with pytest.raises(QmpTimeoutError):
                    await qmp.execute("query-name")
            with pytest.raises(QmpTimeoutError):
                await qmp.execute_with_fd("add-fd", {}, file.fileno())
        bed.send(signal.SIGCONT)
        with trio.fail_after(10):
            assert (await _answered(qmp, "query-status"))["status"] == "prelaunch"
        assert not qmp.hung
        assert "qemu" in await qmp.execute("query-version")


async def _answered(qmp: Monitor, command: str) -> Any:
    """Ask until there is an answer."""
    while True:
        try:
            return await qmp.execute(command)
        except QmpTimeoutError:
            continue


async def test_after_leave_nothing_is_sent(bed: Bed) -> None:
    async with bed.connect(pytest.fail) as qmp:
        qmp.leave("it would hang")
        with pytest.raises(QmpGoneError, match="it would hang"):
            await qmp.execute("cont")
        with pytest.raises(QmpGoneError, match="it would hang"):
            await qmp.execute_with_fd("getfd", {"fdname": "ours"}, 0)
        assert (qmp.gone, qmp.is_left) == ("it would hang", True)
    assert (await bed.ask("query-status"))["status"] == "prelaunch"
