# SPDX-License-Identifier: LGPL-2.1-or-later
"""Something real for each kind of source: what its disks hold, and how to hurt it. A new kind is a line in BEDS."""

import errno
import json
import os
import select
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from qfsbackup.backup.chunk_set import ChunkSet
from qfsbackup.backup.files import ChunkFiles
from qfsbackup.errors import UserError
from qfsbackup.nbd import extents
from qfsbackup.options import Options
from qfsbackup.sources import find
from tests.harness.chunk_set import cut
from tests.harness.disk import MIB, Disk
from tests.harness.files import make_random
from tests.harness.libvirt import libvirt
from tests.harness.nbd_server import storage_daemon
from tests.harness.qemu import Qemu, available, run_img, selected
from tests.harness.vm import running_vm
from tests.vm.support import held

SIZE = 2 * MIB
Break = Callable[[pytest.MonkeyPatch], None]


async def nothing() -> None:
    """There is no state that a source could leave anything in."""


def no_second_map(patch: pytest.MonkeyPatch) -> None:
    """The map of the second disk cannot be had: the first one's connection is there by then."""
    true, asked = extents.allocation, []

    async def allocation(uri: str, size: int) -> Any:
        asked.append(uri)
        if len(asked) == 2:
            raise UserError("the second map is missing", "The test took it.")
        return await true(uri, size)

    patch.setattr(extents, "allocation", allocation)


@dataclass(frozen=True)
class Bed:
    """`text` names the source; `held` tells all that a snapshot touches; `vanish` is the end of what it is taken of."""

    text: str
    contents: Mapping[str, bytes] = field(default_factory=dict)  # none: no snapshot can be taken
    relative: str | None = None  # how it is called from the folder that it is in
    vanish: Callable[[], object] = lambda: None
    held: Callable[[], Awaitable[Any]] = nothing
    half_way: Break = no_second_map
    refused: Mapping[str, object] = field(default_factory=dict)  # an option that this kind does not have


def ended(pid: int, kill: Callable[[], object]) -> None:
    """Kill a process, and wait until it is gone: as long as it dies it is there still."""
    descriptor = os.pidfd_open(pid)
    kill()
    assert select.select([descriptor], [], [], 10)[0]
    os.close(descriptor)


async def images(qemu: Qemu, folder: Path, form: str = "raw") -> dict[str, bytes]:
    """Two images, and what they hold."""
    contents = {}
    for seed, name in enumerate(("vda", "vdb")):
        raw = make_random(folder / f"{name}.random", SIZE, seed=seed, hole_every=3)
        await run_img(qemu, "convert", "-f", "raw", "-O", form, raw, folder / f"{name}.{form}")
        contents[name] = raw.read_bytes()
    return contents


@asynccontextmanager
async def by_qmp(qemu: Qemu, folder: Path) -> AsyncIterator[Bed]:
    """A paused VM."""
    contents = await images(qemu, folder, "qcow2")
    disks = [Disk(name, folder / f"{name}.qcow2", SIZE, "qcow2") for name in contents]
    async with running_vm(qemu, folder, disks) as vm:
        vanish, refused = partial(ended, vm.pid, vm.process.kill), {"bitmap": "b0"}
        yield Bed(str(vm.qmp), contents, vm.qmp.name, vanish, partial(held, vm), refused=refused)


@asynccontextmanager
async def by_libvirt(folder: Path) -> AsyncIterator[Bed]:
    """A paused domain."""
    qemu = available()[0]
    contents = await images(qemu, folder, "qcow2")
    disks = [Disk(name, folder / f"{name}.qcow2", SIZE, "qcow2") for name in contents]
    name = f"dom{os.getpid()}"  # on this machine alone: a QEMU is looked for by the name of its domain
    async with libvirt(folder) as host, host.domain(qemu, folder, disks, name=name) as domain:
        await find(domain.source).clean_up(Options(state=folder))  # libvirt's event loop keeps descriptors of its own
        kill = partial(os.kill, domain.pid, signal.SIGKILL)
        vanish, refused = partial(ended, domain.pid, kill), {"agent": Path("/nonexistent")}
        yield Bed(domain.source, contents, None, vanish, domain.view, refused=refused)


@asynccontextmanager
async def by_uri(folder: Path) -> AsyncIterator[Bed]:
    """A storage daemon that would let its data be trimmed."""
    qemu = selected()[-1]
    contents = await images(qemu, folder)
    options = []
    for name in contents:
        file = {"driver": "file", "node-name": name, "filename": str(folder / f"{name}.raw"), "discard": "unmap"}
        export = {"type": "nbd", "id": name, "node-name": name, "name": name, "writable": True}
        options += ["--blockdev", json.dumps(file), "--export", json.dumps(export)]

    async def stored() -> list[bytes]:
        return [(folder / f"{name}.raw").read_bytes() for name in contents]

    async with storage_daemon(qemu, folder, options) as server:
        yield Bed(server.uri, contents, None, server.process.kill, stored, refused={"target": "nas"})


@asynccontextmanager
async def by_image(folder: Path) -> AsyncIterator[Bed]:
    """The image of a VM that is off; it can be looked after, and no more."""
    await images(selected()[-1], folder, "qcow2")

    async def stored() -> bytes:
        return (folder / "vda.qcow2").read_bytes()

    yield Bed(str(folder / "vda.qcow2"), relative="vda.qcow2", held=stored)


@asynccontextmanager
async def by_chunks(folder: Path) -> AsyncIterator[Bed]:
    """A backup as a tool restored it, of which nothing is to change."""
    top = folder / "restored"
    contents = await images(selected()[-1], folder)
    for name, content in contents.items():
        cut(top / "chunks" / name, content)

    async def stored() -> list[tuple[str, int]]:
        return [(str(path), path.stat().st_mtime_ns) for path in sorted(top.rglob("*"))]

    def no_second_disk(patch: pytest.MonkeyPatch) -> None:
        opened = []

        def open_files(chunks: ChunkSet) -> ChunkFiles:
            opened.append(chunks)
            if len(opened) == 2:
                raise FileNotFoundError(errno.ENOENT, "The test took it.")
            return ChunkFiles(chunks)

        patch.setattr("qfsbackup.backup.disk.ChunkFiles", open_files)

    yield Bed(
        f"chunks:{top}",
        contents,
        "chunks:restored",
        partial(top.rename, folder / "gone"),
        stored,
        no_second_disk,
        {"target": "nas", "agent": Path("/run/agent"), "bwlimit": 1},
    )


@asynccontextmanager
async def by_toy(folder: Path) -> AsyncIterator[Bed]:
    """The one that only tests know."""
    disks = folder / "disks"
    disks.mkdir()
    contents = await images(selected()[-1], disks)
    for path in disks.glob("*.random"):
        path.unlink()
    await trio.lowlevel.checkpoint()

    def no_second_file(_: pytest.MonkeyPatch) -> None:
        (disks / "vdb.raw").unlink()
        (disks / "vdb.raw").mkdir()

    yield Bed(
        f"toy:{disks}",
        contents,
        "toy:disks",
        partial(disks.rename, folder / "gone"),
        nothing,
        no_second_file,
        {"target": "nas"},
    )


BEDS: dict[str, Callable[[Path], AbstractAsyncContextManager[Bed]]] = {
    **{f"qmp-{qemu}": partial(by_qmp, qemu) for qemu in selected()},
    "libvirt": by_libvirt,
    "uri": by_uri,
    "image": by_image,
    "chunks": by_chunks,
    "toy": by_toy,
}
