# SPDX-License-Identifier: LGPL-2.1-or-later
"""The limit on what a mount reads a second."""

import random

import trio

from qfsbackup.nbd.bandwidth import Bandwidth
from tests.harness.disk import MIB
from tests.nbd.support import in_fast_time

RATE = 10 * MIB


async def spend(bandwidth: Bandwidth, until: float, lengths: list[int], paid: list[int]) -> None:
    while trio.current_time() < until:
        for length in lengths:
            await bandwidth.pay(length)
            paid.append(length)


@in_fast_time
async def test_ten_seconds_pass_what_ten_seconds_may() -> None:
    bandwidth, paid = Bandwidth(RATE), list[int]()
    await spend(bandwidth, trio.current_time() + 10, [MIB, 4096, 300_000], paid)
    assert abs(sum(paid) / (10 * RATE) - 1) < 0.05


@in_fast_time
async def test_a_pause_earns_no_burst() -> None:
    bandwidth, paid = Bandwidth(RATE), list[int]()
    await bandwidth.pay(MIB)
    await trio.sleep(100)
    await spend(bandwidth, trio.current_time() + 1, [MIB // 8], paid)
    assert sum(paid) <= RATE * 1.15


@in_fast_time
async def test_two_disks_get_the_same() -> None:
    bandwidth = Bandwidth(RATE)
    one, two = list[int](), list[int]()
    until = trio.current_time() + 10
    async with trio.open_nursery() as nursery:
        nursery.start_soon(spend, bandwidth, until, [MIB // 2], one)
        nursery.start_soon(spend, bandwidth, until, [MIB // 2], two)
    assert abs(sum(one) - sum(two)) <= MIB // 2


@in_fast_time
async def test_one_who_gives_up_costs_nothing() -> None:
    bandwidth = Bandwidth(RATE)
    await bandwidth.pay(10 * RATE)
    with trio.move_on_after(random.Random(3).random()):
        await bandwidth.pay(10 * RATE)
    start = trio.current_time()
    await bandwidth.pay(1)
    assert trio.current_time() - start < 10
