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
from typing import Protocol

Done = Callable[[Exception | None], None]


class Neighbour(Protocol):
    """Who also has requests in flight, none of which meets a job that is here; says `advance` when one is over."""

    def meets(self, start: int, end: int, /) -> bool:
        """Is any byte of the range in one of them."""
        ...


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
        self.running: dict[Job, None] = {}
        self.waiting: list[Job] = []
        self.neighbour: Neighbour | None = None

    @property
    def has_room(self) -> bool:
        """Would a job that meets no other go out at once."""
        return not self.waiting and len(self.running) < self.depth

    def is_busy(self, start: int, end: int) -> bool:
        """Is any byte of the range with the server."""
        return any(job.start < end and start < job.end for job in self.running)

    def put(self, job: Job) -> None:
        """Send the job now or as soon as the rule and the depth permit."""
        if self.has_room and not self._meets(job, ()):
            self._start(job)
        else:
            self.waiting.append(job)
            self.advance()

    def _meets(self, job: Job, earlier: Iterable[Job]) -> bool:
        if self.neighbour and self.neighbour.meets(job.start, job.end):
            return True
        return job.meets(self.running) or job.meets(earlier)

    def finished(self, job: Job) -> None:
        """The server has answered."""
        self.running.pop(job, None)
        self.advance()

    def withdraw(self, job: Job) -> bool:
        """Take back a job that still waits. One that the server has already stays in flight until its answer."""
        if job not in self.waiting:
            return False
        self.waiting.remove(job)
        self.advance()
        return True

    def take_waiting(self) -> list[Job]:
        """Take back all that wait."""
        waiting = self.waiting.copy()
        self.waiting.clear()  # the list is the neighbour's to look at
        return waiting

    def advance(self) -> None:
        """Start what can be: a request is over. Starting may fail at once, and so come back here before it returns."""
        index = 0
        while index < len(self.waiting) and len(self.running) < self.depth:
            job = self.waiting[index]
            if self._meets(job, self.waiting[:index]):
                index += 1
            else:
                del self.waiting[index]
                self._start(job)

    def _start(self, job: Job) -> None:
        self.running[job] = None
        self._send(job)
