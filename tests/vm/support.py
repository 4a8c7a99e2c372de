# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tests of snapshots share: a source, what QEMU holds, writing as the guest would, reading over NBD."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio

from qfsbackup.contracts import Mounting, Snapshot, SnapshotDisk, Source
from qfsbackup.facts import CLUSTER, CheckpointRequest
from qfsbackup.mount.tree import note
from qfsbackup.nbd.export import Export
from qfsbackup.options import Options
from qfsbackup.sources.qemu import QemuSource
from qfsbackup.status import Status
from qfsbackup.vm.quirks import keeps_fdsets
from tests.harness.vm import Vm


@dataclass(frozen=True)
class Snapshots:
    """A source, and what snapshots of it are taken for."""

    source: Source
    socket: Path
    mounting: Mounting

    @property
    def status(self) -> Status:
        return self.mounting.status

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Snapshot]:
        """As a mount takes it."""
        async with self.source.snapshot(self.mounting) as snapshot:
            note(self.status, snapshot, self.mounting.options)
            yield snapshot


def make_source(
    vm: Vm,
    folder: Path,
    /,
    *,
    socket: Path | None = None,
    runtime: Path | None = None,
    checkpoint: CheckpointRequest | None = None,
    generations: Callable[[str], Awaitable[Collection[str]]] | None = None,
    **options: Any,
) -> Snapshots:
    """Snapshots of the VM with these options of a mount, which keep everything in `folder`."""
    place: dict[str, Any] = {"fleece": folder, "connections": 1}
    chosen = Options(**(place | options))
    return Snapshots(
        QemuSource(socket or vm.qmp),
        socket or vm.qmp,
        Mounting(chosen, runtime or folder, Status(), checkpoint=checkpoint, generations=generations),
    )


def served(disk: SnapshotDisk) -> Export:
    """What QEMU serves of it, for tools that speak NBD themselves."""
    assert isinstance(disk.open, partial)
    found: Export = disk.open.args[0].export
    return found


async def held(vm: Vm) -> dict[str, Any]:
    """All in QEMU that a snapshot touches, to be compared before and after."""
    run = vm.monitor.execute
    nodes = await run("query-named-block-nodes", flat=True)
    status = (await run("query-status"))["status"]
    # QEMU 7.2 forgets a removed fdset only while the VM runs (monitor_fdset_cleanup).
    fdsets = [] if keeps_fdsets(vm.qemu.version) and status != "running" else await run("query-fdsets")
    return {
        "nodes": sorted((node["node-name"], node["drv"], node["ro"]) for node in nodes),
        "sizes": sorted((node["node-name"], node["image"]["virtual-size"]) for node in nodes),
        "bitmaps": sorted((node["node-name"], str(node.get("dirty-bitmaps"))) for node in nodes),
        "devices": {block["qdev"]: _device(block) for block in await run("query-block") if "qdev" in block},
        "cache": await _cache(vm, status),
        "exports": await run("query-block-exports"),
        "jobs": [(job["device"], job["type"]) for job in await run("query-block-jobs")],
        "fdsets": fdsets,
        "chardevs": sorted(chardev["label"] for chardev in await run("query-chardev")),
        "status": status,
    }


def _device(block: dict[str, Any]) -> tuple[Any, ...]:
    inserted = block.get("inserted", {})
    return inserted.get("node-name"), block["device"], block.get("tray_open")


async def _cache(vm: Vm, status: str) -> list[Any]:
    """The cache modes of the devices; a running firmware sets them when it likes."""
    if status == "running":
        return []
    return [block.get("inserted", {}).get("cache") for block in await vm.monitor.execute("query-block")]


async def server_runs(vm: Vm) -> bool:
    """Does QEMU's NBD server run? The only way to tell is to stop it."""
    try:
        await vm.monitor.execute("nbd-server-stop")
    except Exception as error:
        if "not running" in str(error):
            return False
        raise
    return True


async def guest_io(vm: Vm, disk: str, command: str) -> None:
    """Let a virtio-blk disk do what its guest would: `guest_io(vm, "vda", "write -P 1 0 64k")`, also in a paused VM."""
    line = f'qemu-io -d /machine/peripheral/{disk}/virtio-backend "{command}"'
    before = len(vm.process.log)
    output = await vm.monitor.execute("human-monitor-command", {"command-line": line})
    assert "rror" not in output, output
    assert "failed" not in output, output
    said = vm.process.log[before:]  # what goes to QEMU's own stdout, the monitor does not tell (QEMU 7.2, 10.0)
    assert not re.search("verification failed|(read|write|discard|flush) failed", said), said


async def copied(disk: SnapshotDisk, path: Path) -> bytes:
    """The whole disk at the instant.

    Read cluster by cluster and without block status: QEMU before 8.0 answers a request that begins in an overwritten
    cluster and ends in another one with what the guest has written since (hbitmap_status, fixed by a4d5224c2c).
    """
    await trio.run_process(["nbdcopy", "--no-extents", f"--request-size={CLUSTER}", served(disk).uri, str(path)])
    return path.read_bytes()  # noqa: ASYNC240 - a few MB


def drop_at(number: int) -> Callable[[str, dict[str, Any]], Awaitable[None]]:
    """A hook for the QMP proxy: the connection drops when the command of this number (from 0) should pass."""
    passed = 0

    async def hook(_name: str, _arguments: dict[str, Any]) -> None:
        nonlocal passed
        passed += 1
        await trio.lowlevel.checkpoint()
        if passed > number:
            raise ConnectionResetError

    return hook
