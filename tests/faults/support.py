# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the fault tests share: many mounts made quickly, killing, and what must hold after every fault."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import trio

from qfsbackup.vm.ours import PREFIX
from tests.harness.monitor import Lines
from tests.harness.mount import ROOT, aside, command, is_mounted, taken_away
from tests.harness.vm import Vm
from tests.vm.support import held

# What only looks. A kill after one of these finds the VM as a kill after the command before it does.
LOOKS = ("query-", "qom-get", "x-debug-query")


def looks(command: str) -> bool:
    """Does a QMP command change nothing."""
    return command.startswith(LOOKS)


class Mounter:
    """See qfsbackup_mounter.py."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._send = process.stdin.send_all
        self._answers = Lines(process.stdout)

    async def mount(self, source: Path, mountpoint: Path, *options: str) -> str | None:
        """None once the tree can be read, or why it cannot."""
        await self._send(json.dumps([str(source), str(mountpoint), *options]).encode() + b"\n")
        answer = await self._answers.next()
        assert answer is not None, "the mounter died"
        error: str | None = json.loads(answer)
        return error


@contextlib.asynccontextmanager
async def mounter(mountpoint: Path) -> AsyncIterator[Mounter]:
    """Makes mounts at `mountpoint`, of which none is left after the block."""
    mountpoint.mkdir()  # noqa: ASYNC240 - nothing is mounted there yet
    command: list[str | Path] = [sys.executable, Path(__file__).with_name("qfsbackup_mounter.py"), mountpoint]
    async with taken_away(mountpoint):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = await trio.lowlevel.open_process(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        try:
            yield Mounter(process)
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


def parent(pid: int) -> int:
    """The process id of a process's parent."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def kill_at_once(pids: Sequence[int]) -> None:
    """SIGKILL for all of them at one instant: none gets to see another one die."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            os.kill(pid, number)


@contextlib.asynccontextmanager
async def ended(pids: Sequence[int], timeout: float = 30) -> AsyncIterator[None]:
    """After the block, wait until all these processes have ended. (A zombie has.)"""
    descriptors = [os.pidfd_open(pid) for pid in pids]
    try:
        yield
        with trio.fail_after(timeout):
            for descriptor in descriptors:
                await trio.lowlevel.wait_readable(descriptor)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


async def unmounted(mountpoint: Path) -> None:
    """umount(2) by somebody, who does not wait for the VM to be restored."""
    await trio.run_process(["umount", str(mountpoint)], capture_stderr=True, check=False)


async def answers(mountpoint: Path) -> int | None:
    """The errno that a look at the mount gets, None where it works or where nothing is mounted."""
    try:
        with trio.fail_after(1):
            await aside(os.stat, mountpoint / "images")
    except OSError as error:
        return error.errno if is_mounted(mountpoint) else None
    return None


async def reads(path: Path, timeout: float = 20) -> bytes:
    """All of a file on a mount. Raises OSError, trio.TooSlowError."""
    with trio.fail_after(timeout):
        return await aside(path.read_bytes)


async def until_eio(path: Path) -> None:
    """Within a second every read of this file is an error."""
    with trio.fail_after(1):
        while True:
            try:
                await reads(path)
            except OSError as error:
                assert error.errno == errno.EIO, error  # noqa: PT017 - the other outcome is that it is read again
                return


async def nothing_of_ours(vm: Vm) -> None:
    """Nothing in QEMU begins with our prefix: no node, bitmap, export, job or fdset."""
    found = [f"{kind}: {name}" for kind, names in (await _names(vm)).items() for name in names if PREFIX in name]
    assert found == []


async def _names(vm: Vm) -> dict[str, list[str]]:
    run = vm.monitor.execute
    nodes = await run("query-named-block-nodes", flat=True)
    return {
        "nodes": [node["node-name"] for node in nodes],
        "bitmaps": [bitmap["name"] for node in nodes for bitmap in node.get("dirty-bitmaps", ()) if "name" in bitmap],
        "exports": [export["id"] for export in await run("query-block-exports")],
        "jobs": [job["device"] for job in await run("query-block-jobs")],
        "fdsets": [str(fd.get("opaque")) for fdset in (await held(vm))["fdsets"] for fd in fdset["fds"]],
    }


async def said(fifo: Path) -> str:
    """What a child writes into a FIFO, at once and before anything else."""
    descriptor = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with trio.fail_after(30):
            await trio.lowlevel.wait_readable(descriptor)
        return os.read(descriptor, 4096).decode()
    finally:
        os.close(descriptor)


async def until(condition: Callable[[], Awaitable[bool]], timeout: float = 15) -> None:
    """Wait for what nobody announces: look again and again. Raises trio.TooSlowError."""
    with trio.fail_after(timeout):
        while not await condition():  # noqa: ASYNC110 - there is no event to wait for
            await trio.sleep(0.05)


@contextlib.asynccontextmanager
async def mounted_at(folder: Path, *words: str | Path) -> AsyncIterator[Path]:
    """A file system at `folder`, made by mount(8)."""
    await aside(folder.mkdir)
    done = await command("mount", *words, folder)
    assert done.code == 0, done.stderr
    try:
        yield folder
    finally:
        with trio.CancelScope(shield=True):
            await command("umount", "-l", folder)
