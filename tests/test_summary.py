# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `run` says at its end, of statuses that are made up: each disk its own case."""

import logging
from typing import Any

import pytest

from qfsbackup.cli.summary import outcome, summarize


def disk(**changes: Any) -> dict[str, Any]:
    """All of it changed and read; its bitmap is kept in the image."""
    whole = {"size": 4096, "data": 4096, "dirty": 4096, "read_bytes": 4096}
    bitmap = {"bitmap": "new", "bitmap_reason": "", "generation": "1", "bitmap_transient": ""}
    return {**whole, **bitmap, **changes}


def status(committed: bool = True, target: str | None = "nas", **disks: Any) -> dict[str, Any]:
    fleecing = {"peak": 0}
    return {"committed": committed, "target": target, "disks": disks, "fleecing": fleecing, "pause_ms": 0.0}


def test_disks_are_sorted_by_what_their_next_backup_depends_on() -> None:
    shared = disk(generation=None, bitmap_reason="others may write to it")
    lines = outcome(status(a=disk(), b=disk(bitmap_transient="a raw image holds none"), c=disk(), d=shared), 0)
    assert list(lines) == [
        "committed to target nas",
        "the next backup of a, c is incremental",
        "the next backup of b is incremental, unless QEMU is restarted before it (a raw image holds none)",
        "the next backup of d is full: others may write to it",
    ]


def test_a_command_that_failed_is_named_with_what_that_means() -> None:
    assert list(outcome(status(committed=False, a=disk()), 7)) == [
        "the command ended with status 7",
        "not committed to target nas: the next backup starts from the last commit again",
    ]
    assert next(outcome(status(committed=False, a=disk()), 137)) == "the command ended with status 137 (SIGKILL)"
    assert list(outcome(status(committed=False, target=None, a=disk()), 0)) == [
        "there is no target=, so the next backup reads everything again"
    ]


@pytest.mark.parametrize(
    ("change", "warned"),
    [
        ({"read_bytes": 0}, True),
        ({"read_bytes": 0, "data": 0}, False),  # tools that skip holes
        ({"read_bytes": 0, "dirty": 0}, False),  # tools that skip what has not changed
        ({}, False),
    ],
)
def test_a_changed_disk_of_which_nothing_was_read_is_warned_of(
    caplog: pytest.LogCaptureFixture, change: dict[str, int], warned: bool
) -> None:
    caplog.set_level(logging.WARNING)
    summarize(status(a=disk(**change)), 0, 1.0)
    assert ("read nothing of a: " in caplog.text) == warned
