# SPDX-License-Identifier: LGPL-2.1-or-later
"""File systems for fleecing files and for state, that fail when a test wants it. All of them are real.

A tmpfs that is too small; an ext4 on a loop device whose bytes nbdkit keeps or refuses to take (its error filter); and
an ext4 served by fuse2fs, which can be stopped: then it hangs, its metadata too.
"""

import contextlib
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import trio

from tests.faults.support import mounted_at, until
from tests.harness.mount import aside, command, is_mounted
from tests.harness.nbd_server import nbdkit
from tests.harness.process import Process, running


@contextlib.asynccontextmanager
async def small_store(folder: Path) -> AsyncIterator[Path]:
    """A tmpfs of 4 MiB."""
    async with mounted_at(folder / "fleece", "-t", "tmpfs", "-o", "size=4M", "none") as path:
        yield path


@contextlib.asynccontextmanager
async def brittle_store(folder: Path) -> AsyncIterator[Path]:
    """An ext4 whose disk takes no more writes once the file `trigger` is there."""
    error = ["error-pwrite=EIO", "error-pwrite-rate=100%", f"error-pwrite-file={folder / 'trigger'}"]
    async with (
        nbdkit(folder, ["--filter=error", "memory", "64M", *error]) as server,
        _file_of(folder, server.uri) as file,
    ):
        assert (await command("mkfs.ext4", "-q", "-F", file)).code == 0
        async with mounted_at(folder / "fleece", "-t", "ext4", "-o", "loop", file) as path:
            try:
                yield path
            finally:
                (folder / "trigger").unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def _file_of(folder: Path, uri: str) -> AsyncIterator[Path]:
    """What an NBD server serves, as a file."""
    file = folder / "store"
    file.touch()
    async with running(["nbdfuse", file, uri], folder / "nbdfuse.log", expected=[0, 1]):
        try:
            await until(lambda: aside(lambda: file.stat().st_size > 0))
            yield file
        finally:
            with trio.CancelScope(shield=True):
                await command("fusermount3", "-u", "-z", file)


@dataclass(frozen=True)
class HangingStore:
    """`path` is the mounted file system."""

    path: Path
    _process: Process

    @property
    def pid(self) -> int:
        """Of the process that serves it."""
        return self._process.pid

    def stop(self) -> None:
        """From now on nothing there answers."""
        self._process.send(signal.SIGSTOP)

    def go_on(self) -> None:
        """It answers again, also what was asked meanwhile."""
        self._process.send(signal.SIGCONT)


@contextlib.asynccontextmanager
async def hanging_store(folder: Path) -> AsyncIterator[HangingStore]:
    """64 MiB at `folder`/store, which answer when the block ends."""
    image, path = folder / "store.img", folder / "store"
    path.mkdir()
    await aside(_make_sparse, image)
    assert (await command("mkfs.ext4", "-q", "-F", image)).code == 0
    async with running(["fuse2fs", "-f", "-o", "fakeroot,rw", image, path], folder / "fuse2fs.log") as process:

        async def is_there() -> bool:
            return is_mounted(path)

        await until(is_there)
        try:
            yield HangingStore(path, process)
        finally:
            process.send(signal.SIGCONT)
            with trio.CancelScope(shield=True):
                await command("umount", "-l", path)


def waits_in(pid: int, function: str) -> bool:
    """Does a thread of the process wait in this function of the kernel (proc(5), wchan)."""
    return any(function in (task / "wchan").read_text() for task in Path(f"/proc/{pid}/task").iterdir())


WAITS_FOR_STORE = "request_wait_answer"  # fs/fuse/dev.c


def _make_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(64 << 20)
