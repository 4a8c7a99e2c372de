# SPDX-License-Identifier: LGPL-2.1-or-later
"""The worker is killed between every two steps of a commit: the next mount starts from the base that is right.

commit:   look at the disks | store   | remove the marks | remove the base of vda | remove the base of vdb | unmount
killed:                       "store" | "mark"           | "first"                | "second"               | "last"
"""

import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import pytest
import trio

from qfsbackup.state.store import open_store
from qfsbackup.vm.ours import NEW
from tests.harness.mount import aside, mounted, qfsbackup
from tests.harness.qemu import Qemu
from tests.harness.qmp_proxy import running_proxy
from tests.harness.vm import UUID
from tests.incremental.support import CHUNK, DISKS, Bed, SkippingTool, bed, bitmap_of, chunk_names
from tests.vm.support import guest_io

Point = Literal["store", "mark", "first", "second", "last"]
POINTS: list[Point] = ["store", "mark", "first", "second", "last"]
KILLED = 128 + signal.SIGKILL
CLOCK_NANOSLEEP = "230 "  # x86-64: how SQLite waits for another's transaction


async def on_disk(lab: Bed) -> dict[str, bytes]:
    """Both disks as they are, by chunk; found without the product."""
    found = {}
    for disk in DISKS:
        content = await aside((await lab.disk(disk, lab.folder / f"{disk}.now")).read_bytes)
        for number, name in enumerate(chunk_names(disk, range(len(content) // CHUNK))):
            found[name] = content[number * CHUNK : (number + 1) * CHUNK]
    return found


def bases(lab: Bed) -> dict[str, str]:
    """The committed generation of each disk, as the store has it."""
    with open_store(lab.folder / "state", UUID, "vm") as store:
        return {name: base.generation for name, base in store.bases("nas").items()}


@pytest.mark.parametrize("point", POINTS)
async def test_a_kill_during_a_commit_leaves_the_base_that_is_right(qemu: Qemu, tmp_path: Path, point: Point) -> None:
    async with bed(qemu, tmp_path) as lab:
        tool = SkippingTool()
        async with lab.mounted("nas") as mount:
            await tool.take(mount)
            await lab.commit()
        old = bases(lab)
        await guest_io(lab.vm, "vda", "write -P 1 64k 64k")
        await guest_io(lab.vm, "vdb", "write -P 1 128k 64k")
        await killed_in_commit(lab, point, tool)
        assert (bases(lab) == old) == (point == "store")
        assert tool.held == await on_disk(lab)
        await guest_io(lab.vm, "vda", "write -P 2 256k 64k")
        await guest_io(lab.vm, "vdb", "write -P 2 512k 64k")
        async with lab.mounted("nas") as mount:
            assert bitmap_of(await mount.json("vm.json")) == {"vda": "reuse", "vdb": "reuse"}
            again = [*chunk_names("vda", [1]), *chunk_names("vdb", [2])] if point == "store" else []
            assert await tool.take(mount) == {*chunk_names("vda", [4]), *chunk_names("vdb", [8]), *again}
            assert tool.held == await on_disk(lab)
            await lab.commit()
        lines = await lab.checkpoints()
        assert len(lines) == len(DISKS)
        assert all(line.endswith(" 0 B dirty now") for line in lines), lines


async def killed_in_commit(lab: Bed, point: Point, tool: SkippingTool) -> None:
    """Mount, let the tool take what is new, and kill the worker in the commit."""
    removed = 0
    worker = 0  # not before the commit

    def kill() -> None:
        nonlocal worker
        os.kill(worker, signal.SIGKILL)
        worker = 0  # what comes now is the clean-up's

    async def on_command(name: str, arguments: dict[str, Any]) -> None:
        nonlocal removed
        if worker and point == "mark" and str(arguments.get("node-name", "")).startswith(NEW):
            kill()
        if worker and name == "block-dirty-bitmap-remove":
            removed += 1
            if removed == {"first": 1, "second": 2}.get(point):
                kill()

    async def on_reply(name: str, _: dict[str, Any], _reply: dict[str, Any]) -> None:
        if worker and name == "block-dirty-bitmap-remove" and (point, removed) == ("last", 2):
            kill()

    proxy = lab.folder / "vm.proxy"
    async with (
        running_proxy(lab.vm.qmp, proxy, on_command, on_reply),
        mounted(proxy, lab.mountpoint, lab.options("nas", "vm=vm"), expected=(KILLED,)) as mount,
    ):
        await tool.take(mount)
        worker = await mount.worker()
        with locked_store(lab) if point == "store" else nullcontext():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(commit_in_vain, lab)
                if point == "store":
                    await waiting_for_the_store(worker)
                    kill()
        await mount.process.wait()


async def commit_in_vain(lab: Bed) -> None:
    """The command says that it has failed."""
    (await qfsbackup("commit", lab.mountpoint)).refused(2, "died while it committed")


@contextmanager
def locked_store(lab: Bed) -> Iterator[None]:
    """Nobody else can write to the store."""
    [path] = (lab.folder / "state").glob("*.sqlite")
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        yield


async def waiting_for_the_store(worker: int) -> None:
    """Until a thread of the worker sleeps for another's transaction to end. The kernel tells nobody when it does."""
    while not await aside(_sleeps, worker):  # noqa: ASYNC110
        await trio.sleep(0.01)


def _sleeps(worker: int) -> bool:
    calls = [path.read_text() for path in Path(f"/proc/{worker}/task").glob("*/syscall")]
    return any(call.startswith(CLOCK_NANOSLEEP) for call in calls)
