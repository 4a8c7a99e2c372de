# SPDX-License-Identifier: LGPL-2.1-or-later
"""The SQLite file below the store: its tables, and that what is committed is on the disk.

synchronous=EXTRA also syncs the folder after a transaction's journal was removed; with less, a power cut right after a
commit may bring the journal, and so the state before it, back (sqlite.org/pragma.html#pragma_synchronous).
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qfsbackup.errors import EXIT_SYSTEM, UserError
from qfsbackup.state.files import prepare_file, set_aside

SECOND = 10**9  # nanoseconds
BUSY_TIMEOUT = 30.0  # seconds to wait for another mount's transaction

APPLICATION = 0x71667362  # "qfsb", SQLite's application_id
FORMAT = 2  # SQLite's user_version
ID_BYTES = 3  # of a store's random id, in which all of its generations begin
FIRST_NUMBERS = 1 << 22  # with room to count on, an inode still fits into 63 bits

EVERY_TARGET = ""  # no target has this name

SCHEMA = (
    "CREATE TABLE disk (number INTEGER PRIMARY KEY AUTOINCREMENT, uuid TEXT NOT NULL, name TEXT NOT NULL, "
    "UNIQUE (uuid, name))",
    "CREATE TABLE store (id TEXT NOT NULL)",
    "CREATE TABLE shown (target TEXT PRIMARY KEY, time INTEGER NOT NULL)",
    "CREATE TABLE base (target TEXT NOT NULL, disk INTEGER NOT NULL REFERENCES disk, generation TEXT NOT NULL, "
    "instant INTEGER NOT NULL, size INTEGER NOT NULL, content TEXT NOT NULL, chunk INTEGER NOT NULL, "
    "times BLOB NOT NULL, digest BLOB NOT NULL, PRIMARY KEY (target, disk))",
)

# Older stores get them when they are opened: nothing is known of how their mounts ended, and what those showed.
LATER = (
    "CREATE TABLE IF NOT EXISTS mounted (target TEXT PRIMARY KEY, clock INTEGER NOT NULL, open INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS uncommitted (target TEXT NOT NULL, disk INTEGER NOT NULL REFERENCES disk, "
    "borders BLOB NOT NULL, digest BLOB NOT NULL, PRIMARY KEY (target, disk))",
)


class UnusableError(Exception):
    """The file is there, and is not a store that this version can use."""


def open_database(path: Path) -> sqlite3.Connection:
    """A sound store at `path`, a new one if need be. Raises UserError where it cannot be had."""
    try:
        prepare_file(path)
        try:
            return _connect(path)
        except UnusableError as error:
            written = set_aside(path, str(error))
        prepare_file(path)
        database = _connect(path)
        with transaction(database):
            show(database, EVERY_TARGET, written // SECOND + 1)  # no mount has shown a time later than this
    except sqlite3.Error as error:
        raise failed(path, error) from error
    return database


def _connect(path: Path) -> sqlite3.Connection:
    """Raises UnusableError."""
    # Called from one thread after the other, never from two at once.
    database = sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
    try:
        database.execute("PRAGMA synchronous = EXTRA")
        _check(database)
    except sqlite3.DatabaseError as error:
        database.close()
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise UnusableError(error) from None
        raise
    except UnusableError:
        database.close()
        raise
    return database


def _check(database: sqlite3.Connection) -> None:
    """Make the tables in an empty file; else see whether the file is sound and ours. Raises UnusableError."""
    found = _value(database, "PRAGMA quick_check")
    if found != "ok":
        raise UnusableError(found)
    if _value(database, "SELECT count(*) FROM sqlite_master") == 0:
        _create(database)
    application, version = _value(database, "PRAGMA application_id"), _value(database, "PRAGMA user_version")
    if (application, version) != (APPLICATION, FORMAT):
        raise UnusableError(f"application {application}, format {version} instead of {APPLICATION}, {FORMAT}")
    for statement in LATER:
        database.execute(statement)


def _create(database: sqlite3.Connection) -> None:
    with transaction(database):
        for statement in SCHEMA:
            database.execute(statement)
        database.execute("INSERT INTO sqlite_sequence VALUES ('disk', ?)", (secrets.randbelow(FIRST_NUMBERS),))
        database.execute("INSERT INTO store VALUES (?)", (secrets.token_hex(ID_BYTES),))
        database.execute(f"PRAGMA application_id = {APPLICATION}")
        database.execute(f"PRAGMA user_version = {FORMAT}")


def _value(database: sqlite3.Connection, query: str) -> object:
    return database.execute(query).fetchone()[0]


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """All of it, on the disk when the block ends, or nothing."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    finally:
        if database.in_transaction:
            database.execute("ROLLBACK")


def show(database: sqlite3.Connection, target: str, time: int) -> None:
    """Remember that a mount of `target` shows `time`, in seconds since the epoch."""
    database.execute("INSERT OR REPLACE INTO shown VALUES (?, ?)", (target, time))


def failed(path: Path, error: sqlite3.Error) -> UserError:
    """The error for the person."""
    return UserError(
        f"the state in {path} cannot be kept: {error}",
        "See whether its folder can be written and has space left, or name another: -o state=DIR",
        EXIT_SYSTEM,
    )
