# SPDX-License-Identifier: LGPL-2.1-or-later
"""The real command in a child process, and mounts that cannot outlive a test.

    async with mounted(vm.qmp, tmp_path / "mnt", "exclude=vdb") as mount:
        await aside((mount.path / "images/vda.raw").read_bytes)

Files of a mount are read in a thread or in a child, never in trio's own thread: a mount that hangs would then hang the
test for good. Leaving the block unmounts, ends the processes, kills what does not end, and shows their log if the test
failed.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

import trio

from .process import CrashError, Process, running

PROGRAM = Path(sys.executable).with_name("qfsbackup")
ROOT = Path(__file__).resolve().parents[2]
READY_TIMEOUT = 60.0  # seconds
END_TIMEOUT = 15.0  # seconds

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


async def aside(function: Callable[[*Ts], T], *arguments: *Ts) -> T:
    """Run a function that may block on a mount in a thread; a test that times out does not wait for it."""
    return await trio.to_thread.run_sync(function, *arguments, abandon_on_cancel=True)


@dataclass(frozen=True)
class Result:
    """How a command ended and what it said."""

    code: int
    stdout: str
    stderr: str

    def refused(self, code: int, *words: str) -> None:
        """Raise AssertionError unless it failed with this exit status and two lines, the first of which has `words`."""
        lines = self.stderr.splitlines()
        assert (self.code, len(lines)) == (code, 2), f"status {self.code}, and it said:\n{self.stderr}"
        assert all(lines), f"an empty line: {lines}"
        for word in words:
            assert word in lines[0], f"{word!r} is missing in {lines[0]!r}"


DONE = Result(0, "", "")


async def command(
    *words: str | Path, environment: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 60
) -> Result:
    """Run any command, without raising for its exit status. Raises trio.TooSlowError; it is then killed."""
    with trio.fail_after(timeout):
        done = await trio.run_process(
            [str(word) for word in words],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            cwd=cwd,
            env={**os.environ, **(environment or {})},
        )
    return Result(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


async def qfsbackup(
    *arguments: str | Path, environment: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 60
) -> Result:
    """Run `qfsbackup` with these arguments."""
    return await command(PROGRAM, *arguments, environment=environment, cwd=cwd, timeout=timeout)


@dataclass(frozen=True)
class Mount:
    """A mount that can be read. `process` is the foreground process, the supervisor."""

    path: Path
    process: Process

    def image(self, disk: str) -> Path:
        """The file of a disk."""
        return self.path / "images" / f"{disk}.raw"

    async def json(self, name: str) -> Any:
        """A JSON file of the tree."""
        return json.loads(await aside((self.path / name).read_bytes))

    async def status(self) -> dict[str, Any]:
        """The live status."""
        status: dict[str, Any] = await self.json(".qfsbackup/status.json")
        return status

    async def fresh_status(self) -> dict[str, Any]:
        """The live status, with figures of the fleecing files that are not older than this call."""
        called = trio.current_time()
        with trio.fail_after(END_TIMEOUT):
            while True:
                asked, status = trio.current_time(), await self.status()
                if asked - status["fleecing"]["age_s"] > called or status["broken"]:
                    return status
                await trio.sleep(0.05)  # there is no event to wait for

    async def worker(self) -> int:
        """The process id of the worker."""
        return int((await self.status())["pid"])


@contextlib.asynccontextmanager
async def mounted(
    source: str | Path, directory: Path, *options: str, expected: Collection[int] = (0,)
) -> AsyncIterator[Mount]:
    """`qfsbackup mount --foreground SOURCE DIRECTORY -o OPTIONS` for the length of the block.

    `expected` are the exit statuses that are no error. The directory is made if it is missing.
    """
    words = [word for option in options for word in ("-o", option)]
    line = [PROGRAM, "mount", "--foreground", "-v", source, directory, *words]
    async with mounting(line, directory, expected=expected) as process:
        yield Mount(directory, process)


@contextlib.asynccontextmanager
async def mounting(
    line: Sequence[str | Path], directory: Path, *, expected: Collection[int] = (0,)
) -> AsyncIterator[Process]:
    """Run a command that mounts something at `directory` and tells NOTIFY_SOCKET, as sd_notify(3) does, when it is
    there. Raises CrashError where it ends before that."""
    directory.mkdir(exist_ok=True)  # noqa: ASYNC240 - nothing is mounted there yet
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        address = f"\0qfsbackup-test-{os.getpid()}-{id(notify):x}"
        notify.bind(address)
        notify.setblocking(False)
        environment = {"NOTIFY_SOCKET": "@" + address[1:], "PYTHONPATH": str(ROOT)}
        log = directory.parent / f"{directory.name}-mount.log"
        async with (
            taken_away(directory),
            running(line, log, environment=environment, expected=expected) as process,
        ):
            await _ready(trio.socket.from_stdlib_socket(notify), process)
            try:
                yield process
            finally:
                await _unmounted(directory, process)


async def _ready(notify: trio.socket.SocketType, process: Process) -> None:
    with trio.fail_after(READY_TIMEOUT):
        async with trio.open_nursery() as nursery:

            async def ended() -> None:
                await process.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(ended)
            assert await notify.recv(64) == b"READY=1"
            nursery.cancel_scope.cancel()
    if process.returncode is not None:
        raise CrashError(f"it ended with status {process.returncode} before it was mounted:\n{process.log}")


async def _unmounted(directory: Path, process: Process) -> None:
    with trio.move_on_after(END_TIMEOUT, shield=True):
        await command("umount", "-l", directory)
        await process.wait()


@contextlib.asynccontextmanager
async def taken_away(directory: Path, *sources: str | Path) -> AsyncIterator[None]:
    """Leave nothing behind that was mounted at `directory` in the block, and no qfsbackup process that has it, or one
    of `sources`, among its arguments. The net under every mount: what it kills has failed to end by itself."""
    try:
        yield
    finally:
        with trio.CancelScope(shield=True):
            for pid in processes_of(directory, *sources):
                await _kill(pid)
            while is_mounted(directory):
                await command("umount", "-l", directory)


def is_mounted(directory: Path) -> bool:
    """Is anything mounted there? (os.path.ismount would ask the mount itself, which may hang or be dead.)"""
    mountpoints = (line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return str(directory) in mountpoints


def processes_of(*arguments: str | Path) -> list[int]:
    """The qfsbackup processes of which one of these is an argument."""
    wanted = {os.fsencode(argument) for argument in arguments}
    return [pid for pid, words in _command_lines() if b"qfsbackup" in words[1] and wanted & set(words)]


def _command_lines() -> list[tuple[int, list[bytes]]]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                found += [(int(entry.name), words)] if len(words) > 2 else []
    return found


async def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        async with ending(pid):
            os.kill(pid, signal.SIGKILL)


@contextlib.asynccontextmanager
async def ending(pid: int, timeout: float = END_TIMEOUT) -> AsyncIterator[None]:
    """The block makes a process end; wait until it has. Raises trio.TooSlowError, ProcessLookupError."""
    descriptor = os.pidfd_open(pid)
    try:
        yield
        with trio.fail_after(timeout):
            await trio.lowlevel.wait_readable(descriptor)
    finally:
        os.close(descriptor)


def as_user(user: int, *words: str | Path) -> list[str | Path]:
    """A command line that runs `words` as another user, without any of root's privileges."""
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--inh-caps=-all", "--", *words]


def start(*words: str | Path, **options: Any) -> subprocess.Popen[bytes]:
    """A child that the test ends and waits for itself."""
    return subprocess.Popen([str(word) for word in words], **options)
