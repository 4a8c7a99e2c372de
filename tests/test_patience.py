# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls that hang hold nobody up: not the event loop, not each other, not the end of the process."""

import subprocess
import sys
import threading
import time

import pytest
import trio
import trio.testing

from qfsbackup.patience import NoAnswerError, in_time


def fail() -> None:
    raise FileNotFoundError("no such thing")


async def test_what_a_call_returns_or_raises_comes_out_as_it_is() -> None:
    assert await in_time(lambda: 5, 10) == 5
    assert await in_time(lambda: "", 10, grace=5) == ""
    with pytest.raises(FileNotFoundError, match="no such thing"):
        await in_time(fail, 10)


async def test_who_hangs_is_left_behind_and_takes_no_thread_from_others() -> None:
    hang = threading.Event()
    try:
        async with trio.open_nursery() as nursery:

            async def give_up() -> None:
                with pytest.raises(NoAnswerError, match="within 0 s"):
                    await in_time(hang.wait, 0.2)

            for _ in range(60):  # more than trio's own limit
                nursery.start_soon(give_up)
        assert await in_time(lambda: 5, 10) == 5
    finally:
        hang.set()


async def test_cancelled_it_is_given_up_at_once_or_after_its_grace() -> None:
    hang, done = threading.Event(), list[str]()

    def slow() -> None:
        time.sleep(0.2)
        done.append("slow")

    async def patient() -> None:
        await in_time(slow, 60, grace=30)
        done.append("went on")
        await trio.lowlevel.checkpoint()
        done.append("was not cancelled")

    try:
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(in_time, hang.wait, 60)
                nursery.start_soon(patient)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
        assert done == ["slow", "went on"]
    finally:
        hang.set()


def test_a_process_ends_without_those_who_hang() -> None:
    script = """
import threading, trio
from qfsbackup.patience import NoAnswerError, in_time
async def main():
    try:
        await in_time(threading.Event().wait, 0.1)
    except NoAnswerError:
        print("given up")
trio.run(main)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "given up\n"
