# SPDX-License-Identifier: LGPL-2.1-or-later
"""Something real behind each kind of disk, and what it holds. A new kind is a line in BEDS."""

import os
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qfsbackup.contracts import Disk
from qfsbackup.health import Health
from qfsbackup.status import DiskStatus, Status
from tests.contracts.toy import ToyDisk
from tests.fs.memory import MemoryDisk
from tests.harness.chunk_set import cut
from tests.harness.disk import Disk as Image
from tests.harness.files import make_random
from tests.harness.nbd_server import NbdServer, nbdkit, qemu_nbd
from tests.harness.qemu import Qemu, selected
from tests.harness.vm import running_vm
from tests.nbd.disks import opened
from tests.sources.support import snapshot_of
from tests.vm.support import make_source

SIZE = (2 << 20) + 512  # ends in the middle of a cluster
CONTENT = random.Random(8).randbytes(SIZE)


@dataclass(frozen=True)
class Bed:
    """`kill` ends what is behind the disk, where there is such a thing; then `health` says so."""

    disk: Disk
    content: bytes
    health: Health
    figures: DiskStatus | None = None
    kill: Callable[[], None] | None = None
    unit: int = 1  # what shares so many bytes with something readable may go on being read


@asynccontextmanager
async def by_nbd(
    folder: Path, server: AbstractAsyncContextManager[NbdServer], *, unit: int = 1, bwlimit: int | None = None
) -> AsyncIterator[Bed]:
    status, content = Status(), (folder / "image").read_bytes()
    async with server as running, opened(running.uri, len(content), status, bwlimit=bwlimit) as (disk, figures):
        yield Bed(disk, content, status.health, figures, running.process.kill, unit=unit)


def by_qemu_nbd(folder: Path, bwlimit: int | None = None) -> AbstractAsyncContextManager[Bed]:
    """With holes, trimmable, with the lane of small reads unless it has to pay."""
    image = make_random(folder / "image", SIZE, hole_every=5)
    return by_nbd(folder, qemu_nbd(selected()[-1], folder, image, options=["--discard=unmap"]), bwlimit=bwlimit)


def by_nbdkit(
    folder: Path, *options: str, policy: Sequence[str] = (), unit: int = 1
) -> AbstractAsyncContextManager[Bed]:
    image = make_random(folder / "image", SIZE // unit * unit)
    return by_nbd(folder, nbdkit(folder, [*options, "file", image, *policy]), unit=unit)


@asynccontextmanager
async def by_snapshot(qemu: Qemu, folder: Path) -> AsyncIterator[Bed]:
    """QEMU's own, which refuses to read what was trimmed."""
    image = make_random(folder / "vda.raw", SIZE, hole_every=5)
    content = image.read_bytes()
    async with running_vm(qemu, folder, [Image("vda", image, SIZE)]) as vm:
        snapshots = make_source(vm, folder, connections=4)
        async with snapshots.snapshot() as snapshot, snapshot.disks[0].open() as disk:
            status = snapshots.status
            yield Bed(disk, content, status.health, status.disks["vda"], vm.process.kill)


@asynccontextmanager
async def by_chunks(folder: Path) -> AsyncIterator[Bed]:
    """A backup, which somebody changes."""
    content = make_random(folder / "image", SIZE, hole_every=5).read_bytes()
    chunks = cut(folder / "chunks" / "vda", content)

    def change() -> None:
        for path in chunks.glob("*/*"):
            os.truncate(path, 0)

    async with snapshot_of(chunks) as (_, disks, status):
        yield Bed(disks["vda"], content, status.health, status.disks["vda"], change)


@asynccontextmanager
async def by_hand(disk: Disk, content: bytes) -> AsyncIterator[Bed]:
    yield Bed(disk, content, Health())


LARGE = ["blocksize-minimum=4096", "blocksize-error-policy=error"]
KILLABLE: dict[str, Callable[[Path], AbstractAsyncContextManager[Bed]]] = {
    **{f"snapshot-{qemu}": partial(by_snapshot, qemu) for qemu in selected()},
    "qemu-nbd": by_qemu_nbd,
    "paced": lambda folder: by_qemu_nbd(folder, bwlimit=1 << 30),
    "one-connection": lambda folder: by_nbdkit(folder, "--filter=multi-conn", policy=["multi-conn-mode=disable"]),
    "large-blocks": lambda folder: by_nbdkit(folder, "--filter=blocksize-policy", policy=LARGE, unit=4096),
    "read-only": lambda folder: by_nbdkit(folder, "-r"),
    "chunks": by_chunks,
}
BEDS = KILLABLE | {
    "memory": lambda _: by_hand(MemoryDisk(CONTENT), CONTENT),
    "toy": lambda _: by_hand(ToyDisk(CONTENT), CONTENT),
}
