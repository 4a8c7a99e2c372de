# SPDX-License-Identifier: LGPL-2.1-or-later
"""A command that ends when we do, with all that it started, whatever kills us.

    run ----fork----> keeper ----fork, exec----> command ---> what it starts
     '---- leash ------^ a byte: a signal for the command; its end: ours

The keeper adopts what the command's processes leave behind (prctl(2), PR_SET_CHILD_SUBREAPER), so it can find them all.
What is still there when the command has ended in order is left alone.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from qfsbackup.errors import UserError

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2)
PATIENCE = ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0))  # seconds that they have to end
TERMINAL = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP)  # these reach the command by other ways
KILLED = 128 + signal.SIGKILL


class Command:
    """A running command, made by `started`."""

    def __init__(self, keeper: int, leash: int) -> None:
        self._keeper = keeper  # process id
        self._leash = leash
        self._code: int | None = None

    def send_signal(self, number: int) -> None:
        """Nothing where it has ended."""
        with suppress(BrokenPipeError):
            os.write(self._leash, bytes([number]))

    def wait(self, timeout: float) -> int | None:
        """Its exit status, 128 and more after a signal as a shell says it; None where it still runs after `timeout`
        seconds."""
        if self._code is None:
            descriptor = os.pidfd_open(self._keeper)
            try:
                ended = select.select([descriptor], [], [], timeout)[0]
            finally:
                os.close(descriptor)
            if ended:
                code = os.waitstatus_to_exitcode(os.waitpid(self._keeper, 0)[1])
                self._code = code if code >= 0 else 128 - code
        return self._code


@contextmanager
def started(words: Sequence[str], executable: Path, cwd: Path, environment: Mapping[str, str]) -> Iterator[Command]:
    """Run `words`. Whoever leaves the block before its end, ends it. Raises UserError where it cannot start.

    To be called before there are threads: it forks.
    """
    theirs, leash = os.pipe()
    result, told = os.pipe()
    keeper = os.fork()
    if keeper == 0:
        os.close(leash)
        os.close(result)
        start = partial(
            subprocess.Popen, words, executable=executable, cwd=cwd, env=environment, preexec_fn=_end_with_parent
        )
        _keep(start, theirs, told)
    os.close(theirs)
    os.close(told)
    command = Command(keeper, leash)
    try:
        _check(result, words[0])
        yield command
    finally:
        os.close(leash)
        while command.wait(60.0) is None:
            pass


def _check(result: int, name: str) -> None:
    """Wait until the command has started."""
    with os.fdopen(result, "rb") as lines:
        number = lines.read()
    if number:
        raise UserError(f"cannot run {name}: {os.strerror(int(number))}", "Does it run without qfsbackup?")


def _end_with_parent() -> None:
    """(in the command, before exec) For the case that somebody kills the keeper."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _keep(start: Callable[[], subprocess.Popen[Any]], leash: int, told: int) -> NoReturn:
    """(in the keeper) The whole of its life."""
    code = KILLED
    try:
        code = _kept(start, leash, told)
    finally:
        os._exit(code)


def _kept(start: Callable[[], subprocess.Popen[Any]], leash: int, told: int) -> int:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    for number in TERMINAL:
        if signal.getsignal(number) is not signal.SIG_IGN:  # else the command must go on ignoring it
            signal.signal(number, lambda *_: None)
    with _child_ends() as child_ends:
        try:
            command = start()  # kept: a Popen that goes would wait for the process
        except OSError as error:
            os.write(told, str(error.errno).encode())
            return KILLED
        os.close(told)
        return _wait(command.pid, leash, child_ends)


@contextmanager
def _child_ends() -> Iterator[int]:
    """A descriptor that can be read when a child has ended."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    yield reader


def _wait(command: int, leash: int, child_ends: int) -> int:
    while True:
        ready = select.select([leash, child_ends], [], [])[0]
        if child_ends in ready:
            os.read(child_ends, 4096)
            code = _reap().get(command)
            if code is not None:
                return code if code >= 0 else 128 - code
        if leash in ready:
            numbers = os.read(leash, 64)
            if not numbers:
                _end_all(child_ends)
                return KILLED
            for number in numbers:
                os.kill(command, number)


def _reap() -> dict[int, int]:
    """The exit status of each child that has ended, by process id."""
    ended = {}
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            ended[found[0]] = os.waitstatus_to_exitcode(found[1])
    return ended


def _end_all(child_ends: int) -> None:
    """Let the command and all that came of it end, in order if it can."""
    for number, patience in PATIENCE:
        give_up = time.monotonic() + patience
        while (left := _descendants()) and time.monotonic() < give_up:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            select.select([child_ends], [], [], 0.5)
            with suppress(BlockingIOError):
                os.read(child_ends, 4096)
            _reap()


def _descendants() -> set[int]:
    """Every living process below this one."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            fields = stat.read_text().rpartition(")")[2].split()  # proc(5): state, parent, ...
            if fields[0] not in "ZX":
                children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found: set[int] = set()
    unseen = [os.getpid()]
    while unseen:
        below = children.get(unseen.pop(), [])
        found.update(below)
        unseen += below
    return found
