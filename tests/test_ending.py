# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every way to end a mount ends it in order: signals, a terminal that closes, a worker that stands still."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from qfsbackup.mount.notify import more_time, notify
from tests.e2e.support import left_as_it_was
from tests.faults.support import ended, said
from tests.harness.mount import PROGRAM, Mount, is_mounted, mounted, mounting
from tests.harness.vm import Vm

pytestmark = pytest.mark.one_qemu

# The real command, with one second instead of a minute.
IMPATIENT = (
    "import qfsbackup.mount.supervisor as s, sys; s.PATIENCE = 1; from qfsbackup.cli.main import main; sys.exit(main())"
)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT], ids=lambda number: number.name)
async def test_a_signal_ends_it_in_order(vm: Vm, directory: Path, number: signal.Signals) -> None:
    async with left_as_it_was(vm), mounted(vm.qmp, directory) as mount:
        async with ended([mount.process.pid, await mount.worker()]):
            os.kill(mount.process.pid, number)
        assert mount.process.returncode == 0
        assert not is_mounted(directory)


class Notified:
    """What systemd would hear."""

    def __init__(self, notify: socket.socket) -> None:
        self._socket = trio.socket.from_stdlib_socket(notify)

    async def next(self) -> str:
        with trio.fail_after(30):
            return (await self._socket.recv(256)).decode()


@contextlib.contextmanager
def notified() -> Iterator[tuple[Notified, dict[str, str]]]:
    """Listen where the environment of a process says that systemd does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        address = f"qfsbackup-test-{os.getpid()}-{id(notify):x}"
        notify.bind("\0" + address)
        notify.setblocking(False)
        yield Notified(notify), {**os.environ, "NOTIFY_SOCKET": "@" + address}


@contextlib.asynccontextmanager
async def in_a_terminal(*words: str | Path, environment: dict[str, str]) -> AsyncIterator[tuple[trio.Process, int]]:
    """A command whose terminal closes at the end of the block, and who then ends."""
    ours, theirs = os.openpty()
    line = ["setsid", "--ctty", *map(str, words)]
    process = await trio.lowlevel.open_process(line, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    try:
        yield process, ours
    finally:
        os.close(ours)
        with trio.move_on_after(30, shield=True):
            await process.wait()
        process.kill()


async def test_a_terminal_that_closes_ends_a_mount_in_the_foreground(vm: Vm, directory: Path) -> None:
    async with left_as_it_was(vm):
        with notified() as (systemd, environment):
            words = (PROGRAM, "mount", "--foreground", "-v", vm.qmp, directory)
            async with in_a_terminal(*words, environment=environment) as (process, _):
                assert await systemd.next() == "READY=1"
                assert is_mounted(directory)
        assert process.returncode == 0
        assert not is_mounted(directory)


async def test_a_terminal_that_closes_ends_a_run(vm: Vm, directory: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    async with left_as_it_was(vm):
        shell = f"echo here > {fifo}; exec sleep 60"
        words = (PROGRAM, "run", vm.qmp, "--mountpoint", directory, "--", "sh", "-c", shell)
        async with in_a_terminal(*words, environment=dict(os.environ)) as (process, _):
            assert await said(fifo) == "here\n"
            assert is_mounted(directory)
        assert process.returncode == 128 + signal.SIGHUP
        assert not is_mounted(directory)


async def test_a_worker_that_does_not_end_is_killed_and_the_vm_restored(vm: Vm, directory: Path) -> None:
    line: list[str | Path] = [sys.executable, "-c", IMPATIENT, "mount", "--foreground", "-v", vm.qmp, directory]
    async with left_as_it_was(vm), mounting(line, directory, expected=[128 + signal.SIGKILL]) as process:
        worker = await Mount(directory, process).worker()
        async with ended([process.pid, worker]):
            os.kill(worker, signal.SIGSTOP)
            os.kill(process.pid, signal.SIGTERM)
        assert process.returncode == 128 + signal.SIGKILL
        assert "has not ended within 1 s" in process.log
        assert not is_mounted(directory)


async def test_systemd_hears_that_it_lives_and_that_it_ends(vm: Vm, directory: Path) -> None:
    with notified() as (systemd, environment):
        environment["WATCHDOG_USEC"] = "200000"
        command: list[str | Path] = [PROGRAM, "mount", "--foreground", vm.qmp, directory]
        process = await trio.lowlevel.open_process(command, env=environment, stderr=subprocess.DEVNULL)
        heard = {await systemd.next() for _ in range(4)}
        assert heard == {"READY=1", "WATCHDOG=1"}
        process.terminate()
        while await systemd.next() != "STOPPING=1":
            pass
        with trio.fail_after(30):
            assert await process.wait() == 0


async def test_systemd_is_asked_for_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with notified() as (systemd, environment):
        monkeypatch.setenv("NOTIFY_SOCKET", environment["NOTIFY_SOCKET"])
        more_time(1.5)
        assert await systemd.next() == "EXTEND_TIMEOUT_USEC=1500000"


def test_a_systemd_that_does_not_listen_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:

    with notified() as (_, environment):
        monkeypatch.setenv("NOTIFY_SOCKET", environment["NOTIFY_SOCKET"])
        for _ in range(1000):
            notify("WATCHDOG=1")
    notify("WATCHDOG=1")  # nor one that is gone
