# SPDX-License-Identifier: LGPL-2.1-or-later
"""The times that a mount shows on what has changed: never one that a tool could take for an old one."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qfsbackup.state.files import store_path
from qfsbackup.state.store import open_store

SECOND = 10**9
INSTANT = 1_700_000_000 * SECOND + 123
UUID = "6d3a5b5e-4c55-4c5f-9d3c-1d1f0a4f7f00"

moment = st.integers(0, 20 * SECOND) | st.integers(-INSTANT, INSTANT)


@settings(deadline=None)
@given(mounts=st.lists(st.tuples(moment, st.integers(0, 20 * SECOND), st.booleans()), min_size=2, max_size=8))
def test_times_are_whole_seconds_above_all_earlier_ones_and_behind_the_last_mounts_end(
    tmp_path_factory: pytest.TempPathFactory, mounts: list[tuple[int, int, bool]]
) -> None:
    """Of each mount: how long after the last one it began, how long it was, was it killed."""
    folder, shown, now, ended = tmp_path_factory.mktemp("state"), [0], INSTANT, None
    for pause, length, killed in mounts:
        now = max(now + pause, 0)
        with open_store(folder, UUID, "web1") as store:
            time = store.begin("nas", now)
            behind = ended or now if shown[-1] else 0
            usual = now // SECOND * SECOND - 5 * SECOND
            assert time % SECOND == 0
            assert time >= max(shown[-1] + SECOND, usual, behind)
            assert ended is None or time > ended
            assert time <= max(shown[-1], usual, behind, 0) + SECOND, "no later than it must be"
            shown.append(time)
            now += length
            ended = None if killed else now
            if ended is not None:
                store.end("nas", ended)


def test_the_clock_is_called_set_back_where_it_was_and_not_in_quick_succession(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_store(tmp_path, UUID, "web1") as store:
        for number in range(20):
            store.begin("nas", INSTANT + number * SECOND // 10)
            store.end("nas", INSTANT + number * SECOND // 10 + 1)
            assert caplog.text == ""
        store.begin("nas", INSTANT - 10 * SECOND)
        assert "set back by 11 s" in caplog.text


def test_a_store_of_before_takes_the_last_mount_for_killed(tmp_path: Path) -> None:
    with open_store(tmp_path, UUID, "web1") as store:
        store.begin("nas", INSTANT)
        store.end("nas", INSTANT)
    with sqlite3.connect(store_path(tmp_path, "web1")) as database:
        database.execute("DROP TABLE mounted")
    database.close()
    with open_store(tmp_path, UUID, "web1") as store:
        later = INSTANT + 100 * SECOND
        assert later <= store.begin("nas", later) < later + SECOND


def test_each_target_has_its_own_times(tmp_path: Path) -> None:
    with open_store(tmp_path, UUID, "web1") as store:
        assert store.begin("nas", INSTANT) == store.begin("usb", INSTANT)


def test_deleting_a_target_does_not_bring_its_times_back(tmp_path: Path) -> None:
    with open_store(tmp_path, UUID, "web1") as store:
        time = store.begin("nas", INSTANT)
        store.delete("nas")
        assert store.begin("nas", INSTANT) > time
