# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls that read from storage which may be slow or hang, many at once: each in a thread, with a deadline.

    ask ---> waiting ---> running, at most MOST ---> answered
                             |
                             +---> no answer in time: answered so; the thread is left behind, and its turn with it

Where all turns are lost, who waits for one is answered too: nothing there answers any more. A thread that comes back
all the same brings its turn back. This is patience.in_time for thousands of calls a second: no task is made for one.
What threads return is said by an eventfd, for which whoever waits for the kernel can wait as well.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

import trio
from outcome import Error, Outcome, Value
from trio.lowlevel import start_thread_soon, wait_readable

from qfsbackup.facts import Sockets
from qfsbackup.patience import NoAnswerError
from qfsbackup.tasks import background

MOST = 16  # threads of a mount
LOOKS = 10  # for those who wait too long, in the time that each has

Done = Callable[[bytes | Exception], None]


@dataclass(slots=True, eq=False)
class _Job:
    """`done` is gone once it was called."""

    call: Callable[[], bytes]
    done: Done | None
    since: float = 0.0


class Readers:
    """Only `readers` makes one."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._waiting: deque[_Job] = deque()
        self._running: dict[_Job, None] = {}
        self._begun = trio.Event()
        self._returned: deque[tuple[_Job, Outcome[bytes]]] = deque()
        self._open = threading.Lock()  # held by who uses the descriptor in a thread
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def ask(self, call: Callable[[], bytes], done: Done) -> None:
        """Have `done` called once, in trio's thread and not before this returns: with what `call` returns or raises, or
        NoAnswerError."""
        self._waiting.append(_Job(call, done))
        self._advance()

    def _advance(self) -> None:
        while self._waiting and len(self._running) < MOST:
            job = self._waiting.popleft()
            job.since = trio.current_time()
            self._running[job] = None
            self._begun.set()
            start_thread_soon(job.call, partial(self._return, job))

    def _return(self, job: _Job, result: Outcome[bytes]) -> None:
        """In the thread."""
        self._returned.append((job, result))
        with self._open:
            if self.descriptor >= 0:
                os.eventfd_write(self.descriptor, 1)

    async def receive(self) -> None:
        """Task: answer what threads return."""
        while True:
            await wait_readable(self.descriptor)
            self.receive_now()

    def receive_now(self) -> None:
        """Answer what threads have returned."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.descriptor)
        while self._returned:
            job, result = self._returned.popleft()
            del self._running[job]
            self._advance()
            if isinstance(result, Value):
                _answer(job, result.value)
            elif isinstance(result, Error):
                _answer(job, result.error if isinstance(result.error, Exception) else RuntimeError(str(result.error)))

    async def watch(self) -> None:
        """Task: tell those who wait too long."""
        while True:
            await self._begun.wait()
            await trio.sleep(self._seconds / LOOKS)
            late = trio.current_time() - self._seconds
            for job in [job for job in self._running if job.since <= late]:
                _answer(job, NoAnswerError(f"no answer within {self._seconds:.0f} s"))
            if len(self._running) == MOST and all(job.done is None for job in self._running):
                self._refuse(NoAnswerError("the reads before it were not answered"))
            if not self._running:
                self._begun = trio.Event()

    def _refuse(self, error: Exception) -> None:
        while self._waiting:
            _answer(self._waiting.popleft(), error)

    def close(self) -> None:
        """Nothing is asked any more, and who waits is told so."""
        error = NoAnswerError("the disk was closed")
        self._refuse(error)
        for job in self._running:
            _answer(job, error)
        with self._open:
            descriptor, self.descriptor = self.descriptor, -1
        os.close(descriptor)


def _answer(job: _Job, result: bytes | Exception) -> None:
    done, job.done = job.done, None
    if done:
        done(result)


@asynccontextmanager
async def readers(seconds: float, sockets: Sockets) -> AsyncIterator[Readers]:
    """Threads for reads that are answered within so many seconds from their turn on."""
    made = Readers(seconds)
    sockets[made.descriptor] = made.receive_now
    try:
        async with background(made.watch, made.receive):
            yield made
    finally:
        del sockets[made.descriptor]
        made.close()
