# SPDX-License-Identifier: LGPL-2.1-or-later
"""The state store: what is kept, what two mounts do to each other, and what damage costs."""

from __future__ import annotations

import os
import re
import sqlite3
import stat
import subprocess
import sys
from array import array
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qfsbackup.errors import UserError
from qfsbackup.facts import Base
from qfsbackup.state.files import store_path
from qfsbackup.state.store import DiskState, committed_generations, find_store, new_generation, open_store

SECOND = 10**9
INSTANT = 1_700_000_000 * SECOND + 123
UUID = "6d3a5b5e-4c55-4c5f-9d3c-1d1f0a4f7f00"


def state(generation: str = "g1", chunks: int = 3) -> DiskState:
    return DiskState(generation, INSTANT, chunks * 65536, "content", 65536, array("q", range(chunks)))


def test_what_was_committed_is_there_when_the_store_is_opened_again(tmp_path: Path) -> None:
    with open_store(tmp_path, UUID, "web1") as store:
        store.commit("nas", {"vda": state(), "vdb": state("g1", 65536)})
        store.commit("nas", {"vda": state("g2")})
    with open_store(tmp_path, UUID, "web1") as store:
        assert store.disks("nas") == {"vda": state("g2"), "vdb": state("g1", 65536)}
        assert store.bases("nas") == {
            "vda": Base("g2", 3 * 65536, "content"),
            "vdb": Base("g1", 65536 * 65536, "content"),
        }


def test_targets_keep_to_themselves(tmp_path: Path) -> None:
    with open_store(tmp_path, UUID, "web1") as store:
        store.commit("nas", {"vda": state("g1")})
        store.commit("usb", {"vda": state("g2")})
        store.delete("nas")
        assert store.targets() == {"usb": {"vda": state("g2")}}


def test_a_disk_keeps_its_number_whatever_others_come(tmp_path: Path) -> None:
    with open_store(tmp_path, UUID, "web1") as store:
        numbers = [store.disk_number(name) for name in ("vdb", "vda", "vdb")]
    with open_store(tmp_path, UUID, "web1") as store:
        assert [store.disk_number(name) for name in ("vdb", "vda", "vdb")] == numbers
        assert store.disk_number("vdc") not in numbers
        assert (
            store.vm_number() == store.vm_number() not in [*numbers, store.disk_number("null"), store.disk_number("")]
        )
        assert numbers[0] == numbers[2] != numbers[1]
        assert 0 < max(numbers) < 1 << 23, "inodes must fit into 63 bits"


def test_numbers_of_a_lost_store_do_not_come_back(tmp_path: Path) -> None:
    """One in four million does."""
    found = set()
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).mkdir()
        with open_store(tmp_path / name, UUID, "web1") as store:
            found.add(store.disk_number("vda"))
    assert len(found) > 1


@pytest.mark.parametrize("other", [None, "11111111-1111-1111-1111-111111111111"])
def test_another_vm_of_the_same_name_starts_anew_and_above_all_times(tmp_path: Path, other: str | None) -> None:
    with open_store(tmp_path, UUID, "web1") as store:
        store.commit("nas", {"vda": state()})
        number, time = store.disk_number("vda"), store.begin("nas", INSTANT)
    with open_store(tmp_path, other, "web1") as store:
        assert store.bases("nas") == {}
        assert store.disk_number("vda") != number
        assert store.begin("nas", INSTANT) > time
        store.delete("nas")
    with open_store(tmp_path, UUID, "web1") as store:
        assert store.bases("nas") == {"vda": Base("g1", 3 * 65536, "content")}


def test_a_target_is_used_by_one_mount_at_a_time(tmp_path: Path) -> None:
    with open_store(tmp_path, UUID, "web1") as one, open_store(tmp_path, UUID, "web1") as two:
        with one.lock("nas"):
            with two.lock("usb"), pytest.raises(UserError, match="nas"), two.lock("nas"):
                pass
            assert two.begin("usb", INSTANT)
        with two.lock("nas"):
            pass


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    program = (
        "import sys, os, pathlib\n"
        "from qfsbackup.state.store import open_store\n"
        "with open_store(pathlib.Path(sys.argv[1]), None, 'web1') as store, store.lock('nas'):\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, tmp_path], check=False).returncode == -9
    with open_store(tmp_path, None, "web1") as store, store.lock("nas"):
        pass


def test_nobody_else_can_read_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "new" / "state"
    monkeypatch.setattr("qfsbackup.state.files.STATES", folder)
    old = os.umask(0)
    try:
        with open_store(folder, UUID, "web1") as store, store.lock("nas"):
            store.commit("nas", {"vda": state()})
    finally:
        os.umask(old)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


@settings(deadline=None)
@given(
    names=st.sets(
        st.text() | st.sampled_from(["", ".", "..", "/", "a/../b", "A", "a", "\ud800", "x" * 9999]), max_size=6
    )
)
def test_any_name_gives_a_plain_file_of_its_own(names: set[str]) -> None:
    folder = Path("/state")
    paths = {store_path(folder, name) for name in names}
    assert len({str(path).lower() for path in paths}) == len(names)
    assert all(path.parent == folder and len(path.name) < 120 and path.name.isascii() for path in paths)


@pytest.mark.parametrize("name", ["", "../../x", "\ud800", "a\nb"])
def test_names_come_back_as_they_were(tmp_path: Path, name: str) -> None:
    with open_store(tmp_path, None, name) as store:
        store.commit(name, {name: state()})
        assert store.targets() == {name: {name: state()}}


def damage_head(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"nonsense" * 20)


def damage_body(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(path.stat().st_size - 4096))


def cut_off(path: Path) -> None:
    os.truncate(path, 5000)


def make_newer(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 3")
    database.close()


def make_foreign(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE bookmarks (url TEXT)")
    database.close()


@pytest.mark.parametrize("damage", [damage_head, damage_body, cut_off, make_newer, make_foreign])
def test_a_store_that_is_no_good_is_set_aside_and_a_new_one_begun(
    tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    path = store_path(tmp_path, "web1")
    with open_store(tmp_path, UUID, "web1") as store:
        store.commit("nas", {"vda": state("g1", 1000)})
        store.begin("nas", INSTANT)
    damage(path)  # type: ignore[operator]  # one of the functions above
    content = path.read_bytes()
    with open_store(tmp_path, UUID, "web1") as store:
        assert store.targets() == {}
        assert store.begin("nas", 0) > path.stat().st_mtime_ns - 60 * SECOND, "above all times that can have been shown"
        store.commit("nas", {"vda": state()})
    assert "full" in caplog.text
    assert [file.read_bytes() for file in tmp_path.glob("*.unusable-*")] == [content]
    with open_store(tmp_path, UUID, "web1") as store:
        assert store.disks("nas") == {"vda": state()}


def test_a_flipped_bit_in_an_entry_costs_that_disk_a_full_backup(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_store(tmp_path, UUID, "web1") as store:
        store.commit("nas", {"vda": state(), "vdb": state()})
    with sqlite3.connect(store_path(tmp_path, "web1")) as database:
        database.execute("UPDATE base SET size = size + 1 WHERE disk = (SELECT min(disk) FROM base)")
    database.close()
    with open_store(tmp_path, UUID, "web1") as store:
        assert list(store.disks("nas")) == ["vdb"]
    assert "full" in caplog.text


def test_a_transaction_that_was_cut_off_never_was(tmp_path: Path) -> None:
    """The process is killed with a hot journal beside the store, which the next one plays back."""
    with open_store(tmp_path, UUID, "web1") as store:
        store.commit("nas", {"vda": state()})
    program = (
        "import sys, os, sqlite3\n"
        "database = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "database.execute('PRAGMA cache_size = 1')\n"
        "database.execute('BEGIN')\n"
        "database.execute('UPDATE base SET times = zeroblob(1000000)')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    path = store_path(tmp_path, "web1")
    assert subprocess.run([sys.executable, "-c", program, path], check=False).returncode == -9
    assert Path(f"{path}-journal").stat().st_size > 0
    with open_store(tmp_path, UUID, "web1") as store:
        assert store.disks("nas") == {"vda": state()}


def test_a_folder_that_cannot_be_used_is_the_persons_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot keep state"), open_store(tmp_path / "file", UUID, "web1"):
        pass
    store_path(tmp_path, "web1").mkdir()
    with pytest.raises(UserError, match="cannot keep state"), open_store(tmp_path, UUID, "web1"):
        pass


def test_a_folder_that_a_group_may_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o770)
    with pytest.raises(UserError, match="group"), open_store(tmp_path, UUID, "web1"):
        pass


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, 65534, 0)
    with pytest.raises(UserError, match="belongs to user 65534"), open_store(tmp_path, UUID, "web1"):
        pass


def test_a_folder_that_somebody_misspelt_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"), open_store(tmp_path / "sate", UUID, "web1"):
        pass
    with pytest.raises(UserError, match="does not exist"), find_store(tmp_path / "sate", UUID, "web1"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_looking_for_a_store_makes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qfsbackup.state.store.STATES", tmp_path / "usual")
    for folder in (tmp_path, tmp_path / "usual"):
        with find_store(folder, UUID, "web1") as store:
            assert store is None
    assert committed_generations(tmp_path, "web1") == set()
    assert list(tmp_path.iterdir()) == []


def test_a_generation_tells_its_store(tmp_path: Path) -> None:
    """And what is committed for another VM of the name counts as committed."""
    ids = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with open_store(tmp_path / name, UUID, "web1") as store:
            generation = new_generation(store.id())
            assert re.fullmatch("[0-9a-f]{16}", generation)
            assert generation != new_generation(store.id())
            store.commit("nas", {"vda": state(generation)})
        with open_store(tmp_path / name, None, "web1") as store:
            assert generation.startswith(store.id())
            assert committed_generations(tmp_path / name, "web1") == {generation}
            ids.add(store.id())
    assert len(ids) == 2


def test_a_folder_that_everybody_may_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    with pytest.raises(UserError, match="everybody"), open_store(tmp_path, UUID, "web1"):
        pass


def test_a_full_disk_is_the_persons_error_and_keeps_what_was(tmp_path: Path) -> None:
    with open_store(tmp_path, UUID, "web1") as store:
        store.commit("nas", {"vda": state()})
        store._database.execute("PRAGMA max_page_count = 10")
        with pytest.raises(UserError, match="full"):
            store.commit("nas", {"vda": state("g2", 65536)})
        assert store.disks("nas") == {"vda": state()}
