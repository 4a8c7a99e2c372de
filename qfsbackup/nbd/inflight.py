# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which requests are with the server, and the rule that their ranges never overlap.

QEMU 7.1 .. 7.2.14 and 8.0 .. 9.1 abort the VM when two reads of a snapshot overlap (block/reqlist.c), and a read that
meets a discard may return discarded data. So a request whose range meets one in flight waits here until that one is
answered, and requests that meet each other go in the order they came:

    in flight   |--a--|        |--b--|
    waiting        |--c--|              c waits for a
                       |-d-|            d waits for c, although nothing in flight meets it
                                |e|     e waits for b
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

Done = Callable[[Exception | None], None]


@dataclass(slots=True, eq=False)
class Job:
    """A read into `buffer`, or a trim where there is none, of `[start, end)`. `done` is called once, with its error."""

    start: int
    end: int
    buffer: bytearray | memoryview | None
    done: Done
    withdrawn: bool = False

    def meets(self, jobs: Iterable[Job]) -> bool:
        """Is any byte of this job in the range of another one."""
        start, end = self.start, self.end
        return any(job.start < end and start < job.end for job in jobs)


class InFlight:
    """At most `depth` jobs with the server; the others wait for their turn."""

    def __init__(self, depth: int, send: Callable[[Job], None]) -> None:
        """`send` gives a job to the server; whoever hears of its end says `finished`."""
        self.depth = depth
        self._send = send
        self._running: set[Job] = set()
        self._waiting: list[Job] = []

    @property
    def has_room(self) -> bool:
        """Would a job that meets no other go out at once."""
        return not self._waiting and len(self._running) < self.depth

    def is_busy(self, start: int, end: int) -> bool:
        """Is any byte of the range with the server."""
        return any(job.start < end and start < job.end for job in self._running)

    def put(self, job: Job) -> None:
        """Send the job now or as soon as the rule and the depth permit."""
        if self.has_room and not job.meets(self._running):
            self._start(job)
        else:
            self._waiting.append(job)
            self._advance()

    def finished(self, job: Job) -> None:
        """The server has answered."""
        self._running.discard(job)
        self._advance()

    def withdraw(self, job: Job) -> bool:
        """Take back a job that still waits. One that the server has already stays in flight until its answer."""
        if job not in self._waiting:
            return False
        self._waiting.remove(job)
        self._advance()
        return True

    def take_waiting(self) -> list[Job]:
        """Take back all that wait."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def _advance(self) -> None:
        """Start what can be; starting may fail at once, and so come back here before it returns."""
        index = 0
        while index < len(self._waiting) and len(self._running) < self.depth:
            job = self._waiting[index]
            if job.meets(self._running) or job.meets(self._waiting[:index]):
                index += 1
            else:
                del self._waiting[index]
                self._start(job)

    def _start(self, job: Job) -> None:
        self._running.add(job)
        self._send(job)
