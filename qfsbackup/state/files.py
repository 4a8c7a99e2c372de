# SPDX-License-Identifier: LGPL-2.1-or-later
"""The file that a VM's state is kept in: who may read it, how it is locked, what happens where it is no good.

    <folder>/<name>-<hash>.sqlite             the store; the hash keeps hostile and similar names apart
    <folder>/<name>-<hash>.sqlite.lock        held for as long as the store is being opened
    <folder>/<name>-<hash>.<target hash>.lock held for as long as the target is in use
    <folder>/<name>-<hash>.sqlite.unusable-<time>  one that could not be used, set aside

Whoever can write the store decides what a backup leaves out, so the folder must be ours, and nobody else's.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qfsbackup.errors import EXIT_SYSTEM, UserError
from qfsbackup.options import STATES

log = logging.getLogger(__name__)

JOURNALS = ("", "-journal", "-wal", "-shm")  # a hot journal left behind would be played into the next store
READABLE = 40  # characters of a name that its file's name repeats


def store_path(folder: Path, name: str) -> Path:
    """Where the state of the VM `name` is; any name gives a plain file name, different ones different files."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:READABLE].strip("-") or "vm"
    return folder / f"{readable}-{_digest(name)}.sqlite"


def lock_path(store: Path, target: str) -> Path:
    """The lock of one target beside its store."""
    return store.with_suffix(f".{_digest(target)}.lock")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def prepare_folder(folder: Path) -> None:
    """Make the usual folder where it is missing, for us alone. Raises UserError where it cannot be had or trusted."""
    try:
        if folder == STATES:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(folder, error) from None
    check_folder(folder)


def check_folder(folder: Path) -> None:
    """Raises UserError where the folder is not there, or somebody else could change what is in it."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        raise UserError(
            f"the state folder {folder} does not exist; in a new one every chain begins anew",
            f"If that is meant: mkdir -m 700 -p {folder}",
            EXIT_SYSTEM,
        ) from None
    except OSError as error:
        raise _unusable(folder, error) from None
    user = os.geteuid()
    if found.st_uid != user:
        raise UserError(
            f"the state folder {folder} belongs to user {found.st_uid}, not to {user}",
            f"Make it yours: chown {user} {folder}, or name another: -o state=DIR",
            EXIT_SYSTEM,
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        who = "everybody" if found.st_mode & stat.S_IWOTH else f"group {found.st_gid}"
        raise UserError(
            f"{who} may write to the state folder {folder}", f"Make it yours: chmod 700 {folder}", EXIT_SYSTEM
        )


def prepare_file(path: Path) -> None:
    """Make an empty store where there is none, readable by us alone and sure to be there after a power cut."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise _unusable(path, error) from None


@contextmanager
def locked(path: Path, busy: UserError | None = None) -> Iterator[None]:
    """Hold the lock file at `path`; it goes with the process, whatever ends it.

    Waits for another holder, or raises `busy` where that is given. Raises UserError where the file cannot be had.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise _unusable(path, error) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            if busy is None:
                raise
            raise busy from None
        yield
    finally:
        os.close(descriptor)


def set_aside(path: Path, reason: str) -> int:
    """Rename a store that cannot be used, journals too; when it was written last, in nanoseconds since the epoch."""
    aside = f"{path}.unusable-{time.time_ns()}"
    try:
        written = path.stat().st_mtime_ns
        for suffix in JOURNALS:
            journal = Path(f"{path}{suffix}")
            if journal.exists():
                journal.rename(f"{aside}{suffix}")
    except OSError as error:
        raise _unusable(path, error) from None
    log.warning(
        "%s is no good (%s): set aside as %s; the next backup to each target is a full one", path, reason, aside
    )
    return written


def _unusable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot keep state in {path}: {error.strerror}",
        "Run as root, or name another folder: -o state=DIR",
        EXIT_SYSTEM,
    )
