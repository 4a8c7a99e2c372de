# SPDX-License-Identifier: LGPL-2.1-or-later
"""When a read is waited for on the spot."""

from qfsbackup.nbd.patience import CROWD, LATE, Patience


def waited(patience: Patience, reads: int) -> int:
    return sum(patience.waits() for _ in range(reads))


def test_a_lone_reader_is_mostly_waited_for() -> None:
    assert waited(Patience(), 1000) > 900


def test_now_and_then_it_is_looked_around() -> None:
    patience = Patience()
    assert not all(patience.waits() for _ in range(10))
    assert 0 < 100 - waited(patience, 100) < 20


def test_several_readers_are_not_waited_for() -> None:
    patience = Patience()
    for _ in range(100):
        patience.others_came()
        assert not patience.waits()
    assert waited(patience, CROWD - 1) == 0
    assert waited(patience, 10) > 0


def test_a_slow_server_is_left_alone_for_long() -> None:
    patience = Patience()
    waited(patience, 20)
    patience.was_late()
    assert waited(patience, LATE) == 0
    assert waited(patience, 10) == 10
