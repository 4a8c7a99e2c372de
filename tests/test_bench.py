# SPDX-License-Identifier: LGPL-2.1-or-later
"""The benchmark works: each row is measured, and nothing is left behind. How fast is not asked here."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.bench.reading import READING
from tests.bench.rows import ROWS
from tests.harness.mount import ROOT, command

BENCH = [sys.executable, "-m", "tests.bench", "--short", "--directory"]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for the sockets that the benchmark puts below it."""
    with tempfile.TemporaryDirectory(prefix="qb-") as name:
        yield Path(name)


@pytest.mark.parametrize("rows", [READING, sorted(ROWS.keys() - set(READING))], ids=["reading", "other"])
async def test_each_row_is_measured_and_nothing_is_left(rows: list[str], folder: Path) -> None:
    room, output = folder / "room", folder / "bench.json"
    room.mkdir()
    result = await command(*BENCH, room, "--json", output, "--only", *rows, cwd=ROOT, timeout=110)
    assert result.code == 0, result.stderr
    found = json.loads(output.read_text())["rows"]
    assert sorted(found) == sorted(rows)
    for name, row in found.items():
        values = [sample["value"] for samples in row["samples"].values() for sample in samples]
        assert min(values) > 0, f"{name}: {values}"
        assert f"| {row['title']}, {row['unit']} |" in result.stdout
    assert list(room.iterdir()) == []


async def test_a_signal_ends_it_in_order(folder: Path) -> None:
    room = folder / "room"
    room.mkdir()
    words = [*BENCH, room, "--rounds", "1000", "--only", "mount"]
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(_bench, words)
        assert process.stdout is not None
        assert await process.stdout.receive_some()  # its first figure: it is in the midst of it
        process.terminate()
        with trio.fail_after(30):
            assert await process.wait() == 1
    assert list(room.iterdir()) == []


async def _bench(words: list[str | Path], task_status: trio.TaskStatus[trio.Process]) -> None:
    """The benchmark in a child that does not outlive the test."""
    await trio.run_process(words, stdout=subprocess.PIPE, check=False, cwd=ROOT, task_status=task_status)
