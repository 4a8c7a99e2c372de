# SPDX-License-Identifier: LGPL-2.1-or-later
"""A file system that can be made to hang: an ext4 served by fuse2fs, which is stopped. Its metadata hang too."""

import contextlib
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import trio

from tests.faults.support import until
from tests.harness.mount import aside, command, is_mounted
from tests.harness.process import Process, running


@dataclass(frozen=True)
class HangingStore:
    """`path` is the mounted file system."""

    path: Path
    _process: Process

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
