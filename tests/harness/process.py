# SPDX-License-Identifier: LGPL-2.1-or-later
"""Child processes that cannot outlive a test, and whose crash fails it.

    async with running(["qemu-nbd", ...], directory / "qemu-nbd.log") as process:
        ...

Leaving the block ends the process. A process that died from a signal the harness did not send (an assertion's
SIGABRT above all) raises `CrashError`, also when the body was content; every error out of the body carries the log.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from pathlib import Path

import trio


class CrashError(AssertionError):
    """A process of the test bed died from a signal, or ended in error, while the test was using it."""


class Process:
    """A running child: `pid`, `wait()` for its end, `kill()`, `terminate()`, `log` (what it printed)."""

    def __init__(self, popen: subprocess.Popen[bytes], log_path: Path, expected: Collection[int]) -> None:
        self._popen = popen
        self._log_path = log_path
        self._expected = expected
        self._sent: set[int] = set()
        self.pid = popen.pid

    @property
    def log(self) -> str:
        """What the process printed so far, stdout and stderr together."""
        return self._log_path.read_text(errors="replace")

    @property
    def returncode(self) -> int | None:
        """The exit status, minus the signal number after a signal, None while it runs."""
        return self._popen.poll()

    def kill(self) -> None:
        """SIGKILL: the process has no chance to tidy up, and this end is no crash."""
        self.send(signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM: QEMU and the NBD servers shut down cleanly."""
        self.send(signal.SIGTERM)

    def send(self, number: signal.Signals) -> None:
        """Send a signal; an end by this signal is then expected."""
        self._sent.add(number)
        if self._popen.poll() is None:
            self._popen.send_signal(number)

    async def wait(self) -> int:
        """Wait for the end; returns `returncode`."""
        if self._popen.poll() is None:
            descriptor = os.pidfd_open(self.pid)
            try:
                await trio.lowlevel.wait_readable(descriptor)
            finally:
                os.close(descriptor)
        return self._popen.wait()

    def check(self) -> None:
        """Raise `CrashError` if the process has ended, neither as expected nor by a signal sent from here."""
        code = self._popen.poll()
        if code is None or code in self._expected or -code in self._sent:
            return
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        raise CrashError(f"{self._log_path.stem} {end}:\n{self.log}")


@contextlib.asynccontextmanager
async def running(
    command: Sequence[str | Path],
    log: Path,
    *,
    pass_fds: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
    stop_timeout: float = 10,
    expected: Collection[int] = (0,),
) -> AsyncIterator[Process]:
    """Run `command` for the length of the block, its output in the file `log`; ended by SIGTERM, then SIGKILL.
    `expected` are the exit statuses that are no crash."""
    # Not trio's open_process: it forks in a worker thread, and the kernel sends the parent-death signal when that
    # *thread* ends. setpriv execs, so the pid is the command's own.
    with log.open("wb") as output:
        popen = subprocess.Popen(  # noqa: ASYNC220 - returns once the child has exec'ed
            ["setpriv", "--pdeathsig", "KILL", "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=pass_fds,
            env={**os.environ, **(environment or {})},
        )
    process = Process(popen, log, expected)
    try:
        yield process
        process.check()
    except BaseException as error:
        await _stop(process, stop_timeout)
        error.add_note(f"{log.stem} (status {process.returncode}) printed:\n{process.log or '(nothing)'}")
        raise
    await _stop(process, stop_timeout)
    process.check()


async def _stop(process: Process, timeout: float) -> None:
    process.terminate()
    with trio.move_on_after(timeout, shield=True) as patience:
        await process.wait()
    if patience.cancelled_caught:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
