# SPDX-License-Identifier: LGPL-2.1-or-later
"""`qfsbackup restore` makes no disk of chunks that are of two instants, unless it is told to."""

import json
import os
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qfsbackup.backup.chunk_times import SECOND, pack, unpack
from qfsbackup.backup.names import chunk_path
from qfsbackup.errors import UserError
from qfsbackup.restore.restore import restore
from tests.harness.chunk_set import CHUNK, describe

TIMES = [1_700_000_000, 1_700_086_400, 1_700_086_400, 1_700_000_000, 1_700_172_800]
MTIME = TIMES[-1] + 5


def set_time(chunks: Path, number: int, seconds: float) -> None:
    os.utime(chunks / chunk_path(number), ns=(0, int(seconds * SECOND)))


@pytest.fixture
def backup(chunks: Path, tmp_path: Path) -> Path:
    """Five chunks of three mounts, as a tool restores them."""
    for number, time in enumerate(TIMES):
        set_time(chunks, number, time)
    describe(tmp_path, size=4 * CHUNK + 1536, times=TIMES, mtime=MTIME)
    return chunks


def restored(backup: Path, tmp_path: Path) -> bytes:
    restore(backup, tmp_path / "disk.raw")
    return (tmp_path / "disk.raw").read_bytes()


def test_what_belongs_together_is_restored_without_a_word(
    backup: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    set_time(backup, 1, TIMES[1] + 0.75)  # whole seconds count
    assert restored(backup, tmp_path) == (tmp_path / "expected").read_bytes()
    assert caplog.text == ""


@pytest.mark.parametrize("time", [TIMES[0] - 1, TIMES[0], TIMES[1] + 1, TIMES[4], 2_000_000_000])
def test_a_chunk_of_another_instant_is_named(backup: Path, tmp_path: Path, time: int) -> None:
    set_time(backup, 2, time)
    with pytest.raises(UserError, match=r"1 of the 5 chunks .* 000/00000002$") as caught:
        restore(backup, tmp_path / "disk.raw")
    assert "--torn" in caught.value.hint
    assert not list(tmp_path.glob("*disk.raw*"))


def test_who_wants_it_gets_it_torn(backup: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    set_time(backup, 2, 0)
    with pytest.raises(UserError):
        restore(backup, tmp_path / "disk.raw", force=True)
    restore(backup, tmp_path / "disk.raw", torn=True)
    assert (tmp_path / "disk.raw").read_bytes() == (tmp_path / "expected").read_bytes()
    assert "000/00000002" in caplog.text


@pytest.mark.parametrize("whose", ["vm.json", "chunks"])
def test_another_backups_vm_json_is_no_tool_that_keeps_no_times(backup: Path, tmp_path: Path, whose: str) -> None:
    """Not one chunk is of its backup, but it has its own time: or it has not, but some of the chunks have."""
    if whose == "vm.json":
        describe(tmp_path, size=4 * CHUNK + 1536, times=[time + 86400 for time in TIMES], mtime=MTIME + 86400)
    else:
        describe(tmp_path, size=4 * CHUNK + 1536, times=[MTIME, MTIME, *TIMES[2:]], mtime=MTIME)
        (tmp_path / "vm.json").touch()
    with pytest.raises(UserError, match="000/00000000, 000/00000001"):
        restore(backup, tmp_path / "disk.raw")


def test_where_a_tool_keeps_no_times_it_is_said_that_nothing_can_be_known(
    backup: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(5):
        (backup / chunk_path(number)).touch()
    (tmp_path / "vm.json").touch()
    assert restored(backup, tmp_path) == (tmp_path / "expected").read_bytes()
    assert "times were not kept" in caplog.text


def test_an_older_versions_vm_json_is_taken_with_a_word(
    backup: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    describe(tmp_path, size=4 * CHUNK + 1536)
    assert restored(backup, tmp_path) == (tmp_path / "expected").read_bytes()
    assert "older version" in caplog.text


@pytest.mark.parametrize("in_place", [True, False])
def test_a_chunk_that_a_tool_changes_meanwhile_is_noticed(
    backup: Path, tmp_path: Path, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first one is read."""
    path, reading = backup / chunk_path(3), os.pread

    def read(descriptor: int, length: int, offset: int) -> bytes:
        new = path if in_place else path.with_name("new")
        new.write_bytes(bytes(CHUNK))
        new.rename(path)
        return reading(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", read)
    with pytest.raises(UserError, match="00000003 was changed meanwhile"):
        restore(backup, tmp_path / "disk.raw")
    assert not list(tmp_path.glob("*disk.raw*"))


@pytest.mark.parametrize(
    "spoilt",
    [
        {"seconds": TIMES, "chunks": "nonsense!"},
        {"seconds": TIMES, "chunks": "AAAA"},
        {"seconds": [], "chunks": pack(array("q", [0] * 5))["chunks"]},
        {"seconds": TIMES, "chunks": pack(array("q", [0] * 4))["chunks"]},
        {"seconds": TIMES, "chunks": pack(array("q", [0] * 65536))["chunks"]},
        {"seconds": ["x"], "chunks": pack(array("q", [0] * 5))["chunks"]},
        {"seconds": TIMES},
        [1],
    ],
)
def test_times_that_cannot_be_read_are_refused(backup: Path, tmp_path: Path, spoilt: object) -> None:
    description = json.loads((tmp_path / "vm.json").read_text())
    description["disks"][0]["chunk_times"] = spoilt
    (tmp_path / "vm.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"vm\.json cannot be read"):
        restore(backup, tmp_path / "disk.raw")


@given(st.lists(st.integers(-(2**62), 2**62) | st.integers(0, 5 * SECOND), max_size=300))
def test_packed_times_come_back_in_whole_seconds(times: list[int]) -> None:
    packed = json.loads(json.dumps(pack(array("q", times))))
    assert list(unpack(packed["seconds"], packed["chunks"], len(times))) == [time // SECOND for time in times]


def test_the_times_of_the_largest_disk_stay_short() -> None:
    """A year of daily backups, the chunks in the worst order: none has the time of its neighbour."""
    times = array("q", [(number * 7919 % 365) * 86400 * SECOND for number in range(65536)])
    assert len(json.dumps(pack(times))) < 150_000
