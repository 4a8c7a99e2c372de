# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks that are opened together: each gets a connection, and the rest is shared out, also where there are too few."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from qfsbackup.contracts import Mounting, awaited
from qfsbackup.errors import UserError
from qfsbackup.facts import CONNECTIONS
from qfsbackup.nbd import opening
from qfsbackup.nbd.export import Export
from qfsbackup.nbd.handle import Handles
from qfsbackup.nbd.opening import connected_disks
from qfsbackup.options import Options
from qfsbackup.status import DiskStatus, Status
from tests.harness.files import make_random
from tests.harness.nbd_server import storage_daemon
from tests.harness.qemu import Qemu

SIZE = 128 * 1024
pytestmark = pytest.mark.one_qemu


@asynccontextmanager
async def served(qemu: Qemu, folder: Path, count: int, connections: int) -> AsyncIterator[tuple[list[Export], Status]]:
    """So many exports of one image, by a server that takes so many connections."""
    image = make_random(folder / "image", SIZE)
    node = {"driver": "file", "node-name": "node", "filename": str(image), "read-only": True}
    options = ["--blockdev", json.dumps(node)]
    for number in range(count):
        export = {"type": "nbd", "id": f"e{number}", "node-name": "node", "name": f"d{number}"}
        options += ["--export", json.dumps(export)]
    status = Status(disks={f"d{number}": DiskStatus(SIZE) for number in range(count)})
    async with storage_daemon(qemu, folder, options, connections=connections) as server:
        uris = [server.export(f"d{number}") for number in range(count)]
        yield [Export(f"d{n}", uri, SIZE) for n, uri in enumerate(uris)], status


async def connections_of(exports: list[Export], status: Status, wanted: int) -> int:
    """How many there are, while every disk can be read."""
    mounting = Mounting(Options(connections=wanted), Path("/none"), status)
    async with AsyncExitStack() as stack:
        found = await stack.enter_async_context(connected_disks(exports, mounting, own=False))
        disks = [await stack.enter_async_context(disk()) for disk in found]
        contents = {bytes(await awaited(disk.read, 0, SIZE)) for disk in disks}
        assert len(contents) == 1
        return len(mounting.sockets)


async def test_each_disk_has_what_was_asked_for(qemu: Qemu, tmp_path: Path) -> None:
    async with served(qemu, tmp_path, 3, 100) as (exports, status):
        assert await connections_of(exports, status, 4) == 12


async def test_many_disks_share(qemu: Qemu, tmp_path: Path) -> None:
    async with served(qemu, tmp_path, 40, 100) as (exports, status):
        assert await connections_of(exports, status, 4) == CONNECTIONS // 40 * 40


async def test_a_server_that_takes_fewer_gets_fewer(
    qemu: Qemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(opening, "MORE_TIMEOUT", 0.5)
    async with served(qemu, tmp_path, 3, 5) as (exports, status):
        with trio.fail_after(20):
            assert await connections_of(exports, status, 4) == 5
    assert "going on with 5 connections" in caplog.text


async def test_a_server_that_has_not_one_for_each_disk_is_refused(
    qemu: Qemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handles.connect, "__defaults__", (0.5,))
    async with served(qemu, tmp_path, 3, 2) as (exports, status):
        with pytest.raises(UserError, match="does not answer the NBD handshake"):
            await connections_of(exports, status, 4)
