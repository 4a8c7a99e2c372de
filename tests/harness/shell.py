# SPDX-License-Identifier: LGPL-2.1-or-later
"""A root shell inside the guest, over a virtio port (tests/guest/init is the other end), and the guest's writer."""

import base64
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import trio

from .monitor import Lines


class ShellError(AssertionError):
    """A guest command ended with another status than 0; `status`, `stdout` and `stderr` tell the rest."""

    def __init__(self, command: str, status: int, stdout: str, stderr: str) -> None:
        super().__init__(f"guest command {command!r} ended with status {status}:\n{stdout}{stderr}")
        self.status, self.stdout, self.stderr = status, stdout, stderr


class Shell:
    """Runs commands in the guest, one after the other. A command that timed out leaves the shell unusable."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._lines = Lines(stream)
        self._lock = trio.Lock()

    async def ready(self, timeout: float) -> None:
        """Wait until the guest has booted."""
        with trio.fail_after(timeout):
            line = await self._next()
        if line != b"ready":
            raise ShellError("(boot)", -1, line.decode(), "")

    async def run(self, command: str, timeout: float = 30) -> str:
        """Run a script with the guest's /bin/sh; returns stdout, raises ShellError on a status other than 0.

        Background jobs (`&`) live on after their script; they must not expect its stdin.
        """
        async with self._lock:
            with trio.fail_after(timeout):
                await self._stream.send_all(base64.b64encode(command.encode()) + b"\n")
                status, out, err = (await self._next()).split(b" ")
        stdout, stderr = (base64.b64decode(part[1:]).decode(errors="replace") for part in (out, err))
        if int(status) != 0:
            raise ShellError(command, int(status), stdout, stderr)
        return stdout

    async def _next(self) -> bytes:
        line = await self._lines.next()
        if line is None:
            raise EOFError("the guest's shell is gone")
        return line


@dataclass
class Writes:
    """What the guest's writer did, known once `writing()` is left: counts, and latencies in microseconds."""

    writes: int = 0
    errors: int = 0
    first_errno: int = 0
    verified: int = 0
    verify_failures: int = 0
    max_us: int = 0
    p50_us: int = 0
    p99_us: int = 0

    def check(self) -> None:
        """Raise AssertionError unless the guest wrote, saw no error and read back what it had written."""
        assert self.writes > 0, "the guest wrote nothing"
        assert (self.errors, self.verify_failures) == (0, 0), f"the guest's disks misbehaved: {self}"


@contextlib.asynccontextmanager
async def writing(shell: Shell, arguments: str) -> AsyncIterator[Writes]:
    """Keep the guest's writer running (tests/guest/writer.c): `writing(vm.shell, "-o /dev/vda /dev/vdb")`."""
    pid = (await shell.run(f"writer {arguments} > /run/writer.json 2> /run/writer.err & echo $!")).strip()
    result = Writes()
    try:
        yield result
    finally:
        with trio.move_on_after(30, shield=True):
            vars(result).update(await _stop(shell, pid))


async def _stop(shell: Shell, pid: str) -> dict[str, Any]:
    wait = f"while kill -0 {pid} 2> /run/null; do usleep 20000; done"
    output = await shell.run(f"kill -TERM {pid}; {wait}; cat /run/writer.err /run/writer.json")
    loaded: dict[str, Any] = json.loads(output)
    return loaded
