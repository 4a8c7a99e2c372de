# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who shows or copies the frozen disks: all of them read the same snapshot-access nodes of the same mount.

guest disk -> copy-before-write -> snapshot-access -+-> NBD export -+-> qfsbackup (the mount itself)
                                                    |               +-> nbdfuse
                                                    |               +-> nbdcopy
                                                    +-> FUSE export of QEMU
"""

import contextlib
import select
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import trio

from tests.harness.monitor import Monitor
from tests.harness.mount import Mount, command, is_mounted
from tests.harness.process import Process, running

from .stage import Stage

US, CHUNKS, NBDFUSE, QEMU_FUSE = "qfsbackup", "qfsbackup chunks/", "nbdfuse", "QEMU FUSE"
NUMBERS = {"full": 0, "sparse": 1}  # of qfsbackup's exports and nodes: the disks in the VM's order


@dataclass(frozen=True)
class Contender:
    """One that shows the disks as files; `own` are its processes, none where QEMU does the work."""

    name: str
    own: Sequence[int]
    images: Mapping[str, Path]


async def ours(mount: Mount) -> Contender:
    """The mount itself."""
    return Contender(US, [mount.process.pid, await mount.worker()], {disk: mount.image(disk) for disk in NUMBERS})


@contextlib.asynccontextmanager
async def all_mounted(stage: Stage) -> AsyncIterator[list[Contender]]:
    """Everybody on one snapshot."""
    async with contextlib.AsyncExitStack() as stack:
        mount = await stack.enter_async_context(stage.mounted())
        yield [
            await ours(mount),
            await stack.enter_async_context(nbdfuse(stage)),
            await stack.enter_async_context(_qemu_fuse(stage)),
        ]


@contextlib.asynccontextmanager
async def nbdfuse(stage: Stage) -> AsyncIterator[Contender]:
    """One nbdfuse for each export of the mount that is there."""
    async with contextlib.AsyncExitStack() as stack:
        images: dict[str, Path] = {}
        processes = []
        for disk in NUMBERS:
            images[disk] = stage.directory / f"nbdfuse-{disk}.raw"
            words: list[str | Path] = ["nbdfuse", "-r", images[disk], uri(stage, disk)]
            images[disk].touch()
            process = await stack.enter_async_context(running(words, stage.directory / f"nbdfuse-{disk}.log"))
            stack.push_async_callback(_unmount, images[disk], process)
            processes.append(process)
            await _appears(images[disk])
        yield Contender(NBDFUSE, [process.pid for process in processes], images)


@contextlib.asynccontextmanager
async def _qemu_fuse(stage: Stage) -> AsyncIterator[Contender]:
    async with contextlib.AsyncExitStack() as stack:
        images = {disk: stage.directory / f"qemu-{disk}.raw" for disk in NUMBERS}
        for disk, path in images.items():
            path.touch()
            await stack.enter_async_context(_exported(stage.vm.monitor, disk, path))
        yield Contender(QEMU_FUSE, [], images)


@contextlib.asynccontextmanager
async def _exported(monitor: Monitor, disk: str, path: Path) -> AsyncIterator[None]:
    name = f"bench-{disk}"
    node = f"qfsbackup-access-{NUMBERS[disk]}"
    await monitor.execute("block-export-add", type="fuse", id=name, node_name=node, mountpoint=str(path))
    try:
        yield
    finally:
        with trio.move_on_after(10, shield=True):
            await monitor.execute("block-export-del", id=name, mode="hard")
            await monitor.event("BLOCK_EXPORT_DELETED", id=name)


def uri(stage: Stage, disk: str) -> str:
    """The NBD export of the mount that is there."""
    return f"nbd+unix:///qfsbackup-{NUMBERS[disk]}?socket={quote(str(_nbd_socket(stage.vm.pid)))}"


def _nbd_socket(qemu: int) -> Path:
    """The socket that QEMU serves NBD on: of those it has open, the one that was bound where qfsbackup does that."""
    opened = set()
    for entry in Path(f"/proc/{qemu}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            opened.add(str(entry.readlink()))
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()  # proc(5): ..., inode, path
        if len(fields) == 8 and f"socket:[{fields[6]}]" in opened and fields[7].startswith("/run/qfsbackup/"):
            return Path(fields[7])
    raise LookupError("QEMU has no NBD socket of qfsbackup's")


async def _appears(mountpoint: Path) -> None:
    """Wait until something is mounted there (proc(5): the table of mounts polls as POLLPRI when it changes)."""
    with Path("/proc/self/mountinfo").open() as table, select.epoll() as changes, trio.fail_after(20):  # noqa: ASYNC230 - the kernel's
        changes.register(table, select.EPOLLPRI)
        while not is_mounted(mountpoint):
            await trio.lowlevel.wait_readable(changes.fileno())
            changes.poll(0)


async def _unmount(mountpoint: Path, process: Process) -> None:
    with trio.move_on_after(10, shield=True):
        await command("umount", mountpoint)
        await process.wait()
