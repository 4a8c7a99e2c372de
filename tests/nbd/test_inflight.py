# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rule that ranges in flight never overlap, under any order of requests, answers and withdrawals."""

from hypothesis import given, settings
from hypothesis import strategies as st

from qfsbackup.nbd.inflight import InFlight, Job

DEPTH = 3

ranges = st.tuples(st.integers(0, 20), st.integers(1, 8)).map(lambda pair: (pair[0], pair[0] + pair[1]))
steps = st.lists(st.tuples(st.sampled_from(["put", "finish", "withdraw"]), ranges, st.integers(0, 100)), max_size=60)


def ignore(_error: Exception | None) -> None:
    """The tests watch what is sent, not what comes back."""


class Server:
    """Records what is with it, and checks the rule at every request."""

    def __init__(self) -> None:
        self.running: list[Job] = []
        self.order: list[Job] = []

    def send(self, job: Job) -> None:
        assert not job.meets(self.running), "two requests in flight overlap"
        assert len(self.running) < DEPTH
        self.running.append(job)
        self.order.append(job)


@settings(deadline=None)
@given(steps)
def test_ranges_in_flight_never_overlap_and_every_job_has_its_turn(
    steps: list[tuple[str, tuple[int, int], int]],
) -> None:
    server, put, withdrawn = Server(), list[Job](), list[Job]()
    in_flight = InFlight(DEPTH, server.send)
    for action, (start, end), pick in steps:
        if action == "put":
            put.append(Job(start, end, None, ignore))
            in_flight.put(put[-1])
        elif action == "finish" and server.running:
            in_flight.finished(server.running.pop(pick % len(server.running)))
        elif action == "withdraw" and put:
            job = put[pick % len(put)]
            sent = job in server.order
            if in_flight.withdraw(job):
                assert not sent
                withdrawn.append(job)
    while server.running:
        in_flight.finished(server.running.pop(0))
    assert set(server.order) == set(put) - set(withdrawn)
    for earlier, later in ((a, b) for i, a in enumerate(server.order) for b in server.order[i + 1 :] if a.meets([b])):
        assert put.index(earlier) < put.index(later), "a job overtook one that it meets"


def test_a_job_waits_for_one_that_waits_before_it() -> None:
    server = Server()
    in_flight = InFlight(DEPTH, server.send)
    a, c, d = (Job(*ends, None, ignore) for ends in [(0, 4), (2, 8), (6, 10)])
    for job in (a, c, d):
        in_flight.put(job)
    assert server.order == [a]
    assert not in_flight.has_room
    server.running.remove(a)
    in_flight.finished(a)
    assert server.order == [a, c]


def test_a_server_that_fails_at_once_fails_all_that_wait() -> None:
    failed: list[Job] = []

    def send(job: Job) -> None:
        failed.append(job)
        in_flight.finished(job)

    in_flight = InFlight(0, send)
    jobs = [Job(start, start + 2, None, ignore) for start in range(10)]
    for job in jobs:
        in_flight.put(job)
    assert not failed
    in_flight.depth = 1
    in_flight.withdraw(jobs.pop())
    assert failed == jobs


def test_all_that_wait_can_be_taken_back() -> None:
    server = Server()
    in_flight = InFlight(DEPTH, server.send)
    jobs = [Job(0, 4, None, ignore) for _ in range(3)]
    for job in jobs:
        in_flight.put(job)
    assert in_flight.take_waiting() == jobs[1:]
    in_flight.finished(jobs[0])
    assert server.order == jobs[:1]
