# SPDX-License-Identifier: LGPL-2.1-or-later
"""qfsbackup's commands, by the process that qfsbackup_commands.py is."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness.mount import ROOT, Result

TIMEOUT = 75.0  # seconds; more than any deadline of the product's


class Commands:
    """Made by `serving`. `clock` is how many seconds the commands' clock is ahead of ours."""

    def __init__(self, server: subprocess.Popen[bytes], folder: Path) -> None:
        self._server = server
        self._folder = folder
        self.clock = 0

    def now(self) -> int:
        """What the commands' clock says, in nanoseconds since the epoch."""
        return time.time_ns() + self.clock * 10**9

    def start(self, *words: str | Path, environment: Mapping[str, str] | None = None) -> Command:
        """Run `qfsbackup` with these words."""
        line = [str(word) for word in words]
        pid = self._ask({"words": line, "clock": self.clock, "environment": environment or {}})
        return Command(self, pid, self._folder / f"{pid}.out", self._folder / f"{pid}.err")

    def run(self, *words: str | Path) -> Result:
        """The same, to its end."""
        return self.start(*words).wait()

    def mount(self, *words: str | Path) -> Command:
        """Run `qfsbackup mount --foreground` with these words until it is ready or has ended."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            address = f"\0qfsbackup-machine-{os.getpid()}"
            notify.bind(address)
            environment = {"NOTIFY_SOCKET": f"@{address[1:]}"}
            command = self.start("mount", "--foreground", "-v", *words, environment=environment)
            command.ready = command.until(notify.fileno()) and notify.recv(256).startswith(b"READY=1")
        return command

    def code(self, pid: int) -> int:
        """The exit status of a command that has ended, minus the number of the signal that killed it."""
        return self._ask({"wait": pid})

    def _ask(self, request: Mapping[str, Any]) -> int:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request).encode() + b"\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())


@dataclass
class Command:
    """A command that was started; `ready` is a mount's that can be read."""

    commands: Commands
    pid: int
    out: Path
    err: Path
    ready: bool = False

    def until(self, other: int | None) -> bool:
        """Wait until the command has ended, or there is something to be read from a descriptor (True)."""
        descriptor = os.pidfd_open(self.pid)
        try:
            watched = [descriptor, other] if other else [descriptor]
            found, _, _ = select.select(watched, [], [], TIMEOUT)
        finally:
            os.close(descriptor)
        assert found, f"no end within {TIMEOUT} s:\n{self.err.read_text()}"
        return found != [descriptor]

    def wait(self) -> Result:
        """How it ended."""
        self.until(None)
        return Result(self.commands.code(self.pid), self.out.read_text(), self.err.read_text())


@contextmanager
def serving(folder: Path) -> Iterator[Commands]:
    """Commands whose output goes to `folder`."""
    folder.mkdir()
    line: list[str | Path] = [sys.executable, Path(__file__).with_name("qfsbackup_commands.py"), folder]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as server:
        try:
            yield Commands(server, folder)
        finally:
            server.kill()
