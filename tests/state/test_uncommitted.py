# SPDX-License-Identifier: LGPL-2.1-or-later
"""What mounts have shown as changed since the last commit."""

import sqlite3
from pathlib import Path

from qfsbackup.ranges import RangeSet
from qfsbackup.state.files import store_path
from qfsbackup.state.store import open_store
from tests.harness.vm import UUID
from tests.state.test_store import state


def test_what_was_shown_and_not_committed_is_kept_until_the_commit(tmp_path: Path) -> None:
    shown = {"vda": RangeSet([(0, 65536), (1 << 40, 1 << 41)]), "vdb": RangeSet([(5, 6)])}
    with open_store(tmp_path, UUID, "web1") as store:
        assert store.uncommitted("nas") == {}
        store.show_uncommitted("nas", shown)
        store.show_uncommitted("usb", {"vdb": RangeSet()})
    with open_store(tmp_path, UUID, "web1") as store:
        assert store.uncommitted("nas") == shown
        store.commit("nas", {"vda": state()})
        assert store.uncommitted("nas") == {"vdb": shown["vdb"]}
        assert store.uncommitted("usb") == {"vdb": RangeSet()}
    with open_store(tmp_path, None, "web1") as store:
        assert store.uncommitted("nas") == {}


def test_all_of_a_disk_was_shown_where_that_is_damaged(tmp_path: Path) -> None:
    with open_store(tmp_path, UUID, "web1") as store:
        store.show_uncommitted("nas", {"vda": RangeSet([(0, 65536)])})
    with sqlite3.connect(store_path(tmp_path, "web1")) as database:
        database.execute("UPDATE uncommitted SET borders = ?", (RangeSet([(0, 1)]).borders.tobytes(),))
    with open_store(tmp_path, UUID, "web1") as store:
        assert store.uncommitted("nas")["vda"].covers(0, 1 << 62)
