# SPDX-License-Identifier: LGPL-2.1-or-later
"""The checkpoints of one VM: what each target has committed, and every time it has shown.

One SQLite file holds all VMs of one name, by UUID: another VM behind the same name finds nothing to start from, and yet
never shows a time that was shown before. Whatever is lost or damaged makes the next backup a full one. What a method
has stored is on the disk when it returns.

Why a skipped file is always the same file. Tools skip a file whose size, mtime, ctime and inode are what they were.

- A time belongs to one mount of one target: `begin` stores it before anybody sees it, and each is later than all before
  it. A chunk that changed shows the time of its mount, which the tool cannot have.
- Some tools compare with the start of their own last run instead (GNU tar --listed-incremental, find -newer): a chunk
  that changed since then must have a later time. That start lies before the end of the mount in which it was: `end`
  stores when that was, and the next time is later. Where it is not known, for the mount died, the time is the new
  instant, rounded up. To deceive them, the clock must be set back during a mount that then dies.
- A chunk may be what it was at the commit, and yet not what the tool has: a mount that was not committed may have shown
  another one there (disks that change places and back, an image that is put back). So what was shown as changed since
  the commit stays so until the next one: `show_uncommitted` stores it before anybody sees it.
- With the store the times are lost, but also the numbers that the inodes are made of: a new store starts at a random
  one. To deceive rsync, which looks at no inode, or a tool that compares with its own start, the store must be lost
  within seconds of a mount, or the clock be set back as well.

A time is 5 s before the instant: borg forgets files that are younger than its own start less 3 s. It can only be later
where mounts follow each other within seconds, after one that died, or where the clock was set back. Then restic and
rsync go on as ever, for they ask only whether a time is the same; borg reads the chunks with such a time again until
its clock has passed them: slower, never wrong.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import sqlite3
from array import array
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from qfsbackup.errors import UserError
from qfsbackup.facts import Base
from qfsbackup.options import STATES
from qfsbackup.ranges import RangeSet
from qfsbackup.state.database import EVERY_TARGET, ID_BYTES, SECOND, failed, open_database, show, transaction
from qfsbackup.state.files import check_folder, lock_path, locked, prepare_folder, store_path

log = logging.getLogger(__name__)

EARLIER = 5  # seconds before the instant
ALL = 1 << 63  # bytes: no disk is larger
NO_DISK = "null"  # no name looks so: names are JSON strings, in quotes


@dataclass(frozen=True, slots=True)
class DiskState:
    """A disk as it was committed to a target; times in nanoseconds since the epoch, sizes in bytes."""

    generation: str
    instant: int
    size: int
    content: str  # as contracts.SnapshotDisk has it
    chunk: int
    times: array[int]  # of each chunk; type code "q"


class Store:
    """The state of the VM `uuid`. Only `open_store` makes one. Each method raises UserError where storing fails."""

    def __init__(self, database: sqlite3.Connection, path: Path, uuid: str) -> None:
        self._database = database
        self._path = path
        self._uuid = uuid

    def lock(self, target: str) -> AbstractContextManager[None]:
        """Keep other mounts of this VM from using the target meanwhile. Raises UserError where one does."""
        busy = UserError(
            f"the target {target} of this VM is in use by another mount",
            "Unmount that one first, or name another target.",
        )
        return locked(lock_path(self._path, target), busy)

    def disk_number(self, name: str) -> int:
        """The number of a disk: the same for ever, and never another's."""
        return self._number(_as_text(name))

    def vm_number(self) -> int:
        """A number like a disk's, for what belongs to none."""
        return self._number(NO_DISK)

    def _number(self, text: str) -> int:
        key = (self._uuid, text)
        with self._transaction():
            self._database.execute("INSERT OR IGNORE INTO disk (uuid, name) VALUES (?, ?)", key)
            query = "SELECT number FROM disk WHERE uuid = ? AND name = ?"
            number: int = self._database.execute(query, key).fetchone()[0]
        return number

    def bases(self, target: str) -> dict[str, Base]:
        """Where each disk's next incremental backup starts, by the disk's name."""
        return {name: Base(disk.generation, disk.size, disk.content) for name, disk in self.disks(target).items()}

    def id(self) -> str:
        """What all generations of this store begin with; another store has another one."""
        with self._transaction():
            found: str = self._database.execute("SELECT id FROM store").fetchone()[0]
        return found

    def generations(self) -> set[str]:
        """All that is committed, of every target and of every VM of this name."""
        with self._transaction():
            return {row[0] for row in self._database.execute("SELECT generation FROM base")}

    def disks(self, target: str) -> dict[str, DiskState]:
        """What was committed last, by the disk's name."""
        return self.targets().get(target, {})

    def targets(self) -> dict[str, dict[str, DiskState]]:
        """All that was committed: target -> disk's name -> its state. Damaged entries are left out."""
        found: dict[str, dict[str, DiskState]] = {}
        query = (
            "SELECT target, name, disk, generation, instant, size, content, chunk, times, digest "
            "FROM base JOIN disk ON disk = number WHERE uuid = ? ORDER BY target, number"
        )
        with self._transaction():
            rows = self._database.execute(query, (self._uuid,)).fetchall()
        for target, name, *entry, digest in rows:
            if _digest(target, *entry) != digest:
                log.warning("%s: an entry of target %s is damaged; that disk's next backup is full", self._path, target)
                continue
            _, generation, instant, size, content, chunk, times = entry
            state = DiskState(generation, instant, size, content, chunk, array("q", times))
            found.setdefault(json.loads(target), {})[json.loads(name)] = state
        return found

    def begin(self, target: str, instant: int) -> int:
        """The time that a mount with this instant shows on what has changed: in nanoseconds, but whole seconds.

        5 s before the instant, at least 1 s after each time that any mount of the target has shown, whether that was
        committed or not, and behind the end of the target's last mount: where `end` was not called for that, not before
        the instant. It is stored before it is returned.
        """
        text = _as_text(target)
        with self._transaction():
            shown, clock, ended = self._last(text)
            behind = clock // SECOND + 1 if ended else -(-instant // SECOND)
            time = max(instant // SECOND - EARLIER, 1)
            if shown is not None:
                time = max(time, shown + 1, behind)
            show(self._database, text, time)
            self._database.execute("INSERT OR REPLACE INTO mounted VALUES (?, ?, 1)", (text, instant))
        if clock > instant + SECOND:
            log.warning(
                "the clock was set back by %d s since the last mount for target %s: borg may read more until it has"
                " caught up", (clock - instant) // SECOND, target,
            )  # fmt: skip
        return time * SECOND

    def _last(self, target: str) -> tuple[int | None, int, bool]:
        """Of the target's last mount: the time shown in seconds, None without any; the last look at the clock; its end.

        The clock in nanoseconds, and whether it is that of the mount's end.
        """
        query = "SELECT max(time) FROM shown WHERE target IN (?, ?)"
        shown = self._database.execute(query, (target, EVERY_TARGET)).fetchone()[0]
        found = self._database.execute("SELECT clock, open FROM mounted WHERE target = ?", (target,)).fetchone()
        clock, is_open = found or (0, 1)
        return shown, clock, not is_open

    def end(self, target: str, now: int) -> None:
        """The mount of the target that began last has ended, at this time in nanoseconds: no tool has started later."""
        with self._transaction():
            self._database.execute("UPDATE mounted SET clock = ?, open = 0 WHERE target = ?", (now, _as_text(target)))

    def uncommitted(self, target: str) -> dict[str, RangeSet]:
        """By the disk's name, what mounts have shown as changed since the last commit."""
        found = {}
        query = (
            "SELECT name, disk, borders, digest FROM uncommitted JOIN disk ON disk = number "
            "WHERE uuid = ? AND target = ?"
        )
        with self._transaction():
            rows = self._database.execute(query, (self._uuid, _as_text(target))).fetchall()
        for name, disk, borders, digest in rows:
            sound = _digest(_as_text(target), disk, borders) == digest
            found[json.loads(name)] = RangeSet.from_borders(array("Q", borders)) if sound else RangeSet([(0, ALL)])
        return found

    def show_uncommitted(self, target: str, disks: Mapping[str, RangeSet]) -> None:
        """These disks' mounts show this as changed."""
        keys = [(_as_text(target), self.disk_number(name), ranges.borders.tobytes()) for name, ranges in disks.items()]
        with self._transaction():
            rows = [(*key, _digest(*key)) for key in keys]
            self._database.executemany("INSERT OR REPLACE INTO uncommitted VALUES (?, ?, ?, ?)", rows)

    def commit(self, target: str, disks: Mapping[str, DiskState]) -> None:
        """From now on these disks' next backups start here; the target's other disks stay as they are."""
        rows = [self._row(target, name, disk) for name, disk in disks.items()]
        with self._transaction():
            self._database.executemany(
                "DELETE FROM uncommitted WHERE target = ? AND disk = ?", [row[:2] for row in rows]
            )
            self._database.executemany("INSERT OR REPLACE INTO base VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def _row(self, target: str, name: str, disk: DiskState) -> tuple[object, ...]:
        entry = (
            _as_text(target), self.disk_number(name),
            disk.generation, disk.instant, disk.size, disk.content, disk.chunk, disk.times.tobytes(),
        )  # fmt: skip
        return (*entry, _digest(*entry))

    def delete(self, target: str) -> None:
        """Forget what was committed. The times shown are kept: the tool may still have files with them."""
        with self._transaction():
            query = "DELETE FROM base WHERE target = ? AND disk IN (SELECT number FROM disk WHERE uuid = ?)"
            self._database.execute(query, (_as_text(target), self._uuid))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            with transaction(self._database):
                yield
        except sqlite3.Error as error:
            raise failed(self._path, error) from error


@contextmanager
def find_store(folder: Path, uuid: str | None, name: str) -> Iterator[Store | None]:
    """The same, but nothing is made; None where there is none."""
    if folder != STATES or folder.exists():
        check_folder(folder)
    if not store_path(folder, name).exists():
        yield None
        return
    with open_store(folder, uuid, name) as store:
        yield store


@contextmanager
def open_store(folder: Path, uuid: str | None, name: str) -> Iterator[Store]:
    """The state of the VM with this identity, made where there is none; nobody else can read it.

    The folder is made only where it is the usual one: what is misspelt must not begin a chain of its own.

    A store that is damaged, or of a newer version, is set aside and a new one begun: the next backups are full ones.
    Raises UserError where nothing can be kept in `folder`.
    """
    prepare_folder(folder)
    path = store_path(folder, name)
    with locked(Path(f"{path}.lock")):
        database = open_database(path)
    with closing(database):
        yield Store(database, path, uuid or "")


def new_generation(store: str) -> str:
    """The id of a backup of one disk, made by the store with this id: nobody ever has the same."""
    return store + secrets.token_hex(8 - ID_BYTES)


def committed_generations(folder: Path, name: str) -> set[str]:
    """What is committed of all VMs of this name. Raises UserError."""
    with find_store(folder, None, name) as store:
        return store.generations() if store else set()


def _as_text(name: str) -> str:
    """A name as SQLite can hold it: not every string can be UTF-8."""
    return json.dumps(name)


def _digest(*entry: object) -> bytes:
    """Of what an entry says, so that a flipped bit costs a full backup and nothing else."""
    return hashlib.sha256(repr(entry).encode()).digest()
