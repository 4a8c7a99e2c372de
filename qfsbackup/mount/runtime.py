# SPDX-License-Identifier: LGPL-2.1-or-later
"""The folder of one mount under /run: only root can enter it, and what a killed mount left goes with the next one.

A mount holds a lock on its folder as long as it lives, whatever ends it. Folders are made and swept under the lock of
the folder above, so that nobody sweeps one that is just being made.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from qfsbackup.contracts import FROZEN_NOTE
from qfsbackup.errors import EXIT_USAGE, UserError

RUNTIME = Path("/run/qfsbackup")
PREFIX = "mount-"
SOURCE = "source"  # a file in it: what the mount's source is called
LEFT = "left-"  # + a supervisor's process id


def left_note(pid: int) -> Path:
    """A file that says what this supervisor could not take out of its VM yet, for who waits for it; gone when it is."""
    return RUNTIME / f"{LEFT}{pid}"


@contextmanager
def runtime_folder(source: str) -> Iterator[Path]:
    """A folder for this process; its path is short, because a socket's has at most 107 bytes (unix(7)).

    Raises UserError where this user may not have one.
    """
    with ExitStack() as stack:
        try:
            folder = _make(stack)
            (folder / SOURCE).write_text(source)
        except PermissionError:
            raise UserError("mounting a VM needs root", "Run it with sudo.", EXIT_USAGE) from None
        yield folder


def _make(stack: ExitStack) -> Path:
    RUNTIME.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(RUNTIME):
        _sweep()
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=RUNTIME))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.enter_context(_locked(folder))
    return folder


def frozen_by_the_dead() -> list[tuple[Path, str, str]]:
    """Dead mounts that may have left a guest frozen: the note of it, for who removes it once the guest is thawed; what
    the mount's source is called; and what that calls the guest's agent."""
    found = []
    for note in RUNTIME.glob(f"{PREFIX}*/{FROZEN_NOTE}"):
        with suppress(OSError):
            found += [(note, (note.parent / SOURCE).read_text(), note.read_text())] if _dead(note.parent) else []
    return found


def _dead(folder: Path) -> bool:
    with suppress(BlockingIOError, FileNotFoundError), _locked(folder, fcntl.LOCK_NB):
        return True
    return False


def sweep() -> None:
    """Remove the folders of mounts that are dead, but for those that are still needed to thaw a guest."""
    if RUNTIME.is_dir():
        with _locked(RUNTIME):
            _sweep()


def _sweep() -> None:
    for folder in RUNTIME.glob(f"{PREFIX}*"):
        if _dead(folder) and not (folder / FROZEN_NOTE).exists():
            shutil.rmtree(folder, ignore_errors=True)
    for note in RUNTIME.glob(f"{LEFT}*"):
        if not Path("/proc", note.name.removeprefix(LEFT)).exists():
            note.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path, flags: int = 0) -> Iterator[None]:
    """flock(2). Raises BlockingIOError with LOCK_NB."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
        yield
    finally:
        os.close(descriptor)
