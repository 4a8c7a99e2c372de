# SPDX-License-Identifier: LGPL-2.1-or-later
"""Somebody else begins to work on a disk between our look and our act, when we come and when we leave.

`Between` holds one of our commands back, lets the test's own monitor do something to the VM, and lets ours go on.
"""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from qfsbackup.errors import UserError
from tests.harness.disk import MIB, Disk
from tests.harness.monitor import QmpError
from tests.harness.qemu import Qemu
from tests.harness.qmp_proxy import running_proxy
from tests.harness.vm import Vm, running_vm
from tests.vm.fake_agent import Guest, fake_agent
from tests.vm.support import guest_io, held, make_source

SIZE = 4 * MIB
Act = Callable[["Bed"], Awaitable[None]]


class Bed:
    """A paused VM with the disks vda (blockdev) and vdb (legacy drive), and the product's way to it."""

    def __init__(self, vm: Vm, folder: Path) -> None:
        self.vm, self.folder, self.socket = vm, folder, folder / "proxy"
        self.run = vm.monitor.execute
        self.waits: tuple[str, str, Act] | None = None
        self.happened = False

    def between(self, command: str, argument: str, act: Act) -> None:
        """Act when this command, with an argument that holds this word, is on its way to QEMU; once."""
        self.waits = command, argument, act

    async def on_command(self, name: str, arguments: dict[str, Any]) -> None:
        """For the proxy."""
        if self.waits and self.waits[0] == name and self.waits[1] in str(arguments):
            (_, _, act), self.waits = self.waits, None
            await act(self)
            self.happened = True

    async def root(self, disk: str) -> str:
        """The root node of a disk's device now. (query-block passes over the filter of a job that nobody named.)"""
        graph = await self.run("x-debug-query-block-graph")
        names = {node["id"]: node["name"] for node in graph["nodes"]}
        backend = {"vda": "/machine/peripheral/vda/virtio-backend", "vdb": "drive-vdb"}[disk]
        [root] = [names[edge["child"]] for edge in graph["edges"] if names[edge["parent"]] == backend]
        return str(root)

    async def target(self) -> str:
        """A new, empty node of the disks' size."""
        path = self.folder / "target.raw"
        with path.open("wb") as file:
            file.truncate(SIZE)
        await self.run("blockdev-add", {"driver": "file", "node-name": "target", "filename": str(path)})
        return "target"

    async def ours(self) -> list[str]:
        """What is ours in QEMU."""
        return [name for name, _, _ in (await held(self.vm))["nodes"] if "qfsbackup" in name]


@pytest.fixture
async def bed(qemu: Qemu, tmp_path: Path) -> AsyncIterator[Bed]:
    disks = [
        Disk("vda", tmp_path / "vda.raw", SIZE),
        Disk("vdb", tmp_path / "vdb.qcow2", SIZE, format="qcow2", legacy=True),
    ]
    async with running_vm(qemu, tmp_path, disks) as vm:
        bed = Bed(vm, tmp_path)
        async with running_proxy(vm.qmp, bed.socket, bed.on_command):
            yield bed


@contextlib.asynccontextmanager
async def refused(bed: Bed, *words: str) -> AsyncIterator[None]:
    """The block makes a snapshot that is refused; afterwards nothing of ours is there."""
    with pytest.raises(UserError) as caught:
        yield
    assert bed.happened
    assert all(word in caught.value.what for word in words), caught.value.what
    assert await bed.ours() == []


async def mirror(bed: Bed) -> None:
    await bed.run("blockdev-mirror", job_id="job", device="drive-vdb", target=await bed.target(), sync="full")


async def mirror_that_qemu_refuses(bed: Bed) -> None:
    with pytest.raises(QmpError, match="root"):
        await mirror(bed)


async def mirror_of_our_filter(bed: Bed) -> None:
    await mirror(bed)
    assert (await bed.root("vdb")).startswith("#block")


async def backup(bed: Bed) -> None:
    await bed.run("blockdev-backup", job_id="job", device="drive-vdb", target=await bed.target(), sync="none")


async def backup_of_the_disk(bed: Bed) -> None:
    await bed.run("blockdev-backup", job_id="job", device="vda-node", target=await bed.target(), sync="none")


async def snapshot(bed: Bed) -> None:
    overlay = {"snapshot-file": str(bed.folder / "overlay"), "snapshot-node-name": "overlay"}
    await bed.run("blockdev-snapshot-sync", {"node-name": "vda-node", **overlay})


async def resize(bed: Bed) -> None:
    await bed.run("block_resize", {"node-name": "vda-node", "size": 2 * SIZE})


async def pivot(bed: Bed) -> None:
    """Let the mirror come to its end: the guest goes on with the target."""
    await bed.vm.monitor.event("BLOCK_JOB_READY", device="job")
    await bed.run("block-job-complete", device="job")
    await bed.vm.monitor.event("BLOCK_JOB_COMPLETED", device="job")
    assert await bed.root("vdb") == "target"


async def cancel(bed: Bed) -> None:
    with contextlib.suppress(QmpError):  # it may be over
        await bed.run("block-job-cancel", device="job", force=True)
        await bed.vm.monitor.event("BLOCK_JOB_CANCELLED", device="job")


async def test_a_mirror_that_starts_before_our_filter_stands_keeps_every_write(bed: Bed) -> None:
    before = await held(bed.vm)
    await guest_io(bed.vm, "vdb", "write -P 1 0 1M")
    bed.between("add-fd", "", mirror)
    async with (
        refused(bed, "vdb", "somebody is at work"),
        make_source(bed.vm, bed.folder, socket=bed.socket).snapshot(),
    ):
        pytest.fail("was not refused")
    await guest_io(bed.vm, "vdb", "write -P 2 512k 1M")
    await pivot(bed)
    await guest_io(bed.vm, "vdb", "write -P 3 2M 64k")
    content = (bed.folder / "target.raw").read_bytes()
    assert content[: 3 * MIB // 2] == b"\x01" * (MIB // 2) + b"\x02" * MIB
    assert content[2 * MIB :][: 64 * 1024] == b"\x03" * 64 * 1024
    assert (await held(bed.vm))["devices"].keys() == before["devices"].keys()


@pytest.mark.parametrize(
    ("command", "argument", "act", "words"),
    [
        ("add-fd", "", backup, ["vdb", "a block job (job)"]),
        ("add-fd", "", snapshot, ["vda", "its device has overlay"]),
        ("add-fd", "", resize, ["vda", "resized"]),
        ("qom-set", "vdb", backup, ["vdb", "another node"]),
        ("qom-set", "vda", backup_of_the_disk, ["vda", "another node"]),
        ("qom-set", "vda", snapshot, ["vda", "another node"]),
        ("qom-set", "vda", resize, ["vda", "resized"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
async def test_what_comes_in_between_is_found_and_nothing_is_done_to_it(
    bed: Bed, command: str, argument: str, act: Act, words: list[str]
) -> None:
    bed.between(command, argument, act)
    async with refused(bed, *words), make_source(bed.vm, bed.folder, socket=bed.socket).snapshot():
        pytest.fail("was not refused")
    if act is snapshot:
        assert await bed.root("vda") == "overlay"
    for disk in ("vda", "vdb"):
        await guest_io(bed.vm, disk, "write -P 9 0 1M")
    await cancel(bed)
    assert await bed.root("vda") == ("overlay" if act is snapshot else "vda-node")


async def test_a_mirror_cannot_start_while_our_filter_stands(bed: Bed) -> None:
    bed.between("qom-set", "vdb", mirror_that_qemu_refuses)
    async with make_source(bed.vm, bed.folder, socket=bed.socket).snapshot():
        assert bed.happened


@pytest.mark.parametrize("act", [backup_of_the_disk, snapshot], ids=lambda act: act.__name__)
async def test_what_comes_in_between_when_we_leave_keeps_its_place(bed: Bed, act: Act) -> None:
    async with make_source(bed.vm, bed.folder, socket=bed.socket).snapshot():
        bed.between("qom-set", "vda", act)
    assert bed.happened
    assert await bed.ours() == []
    nodes = {node["node-name"]: node for node in await bed.run("query-named-block-nodes", flat=True)}
    top = await bed.root("vda")
    assert top == "overlay" if act is snapshot else nodes[top]["drv"] == "copy-before-write"
    await guest_io(bed.vm, "vda", "write -P 9 0 1M")
    await cancel(bed)


async def test_a_mirror_of_our_filter_that_starts_when_we_leave_keeps_every_write(bed: Bed) -> None:
    """QEMU refuses to take our filter out from under it; it stays until the mirror is over."""
    await guest_io(bed.vm, "vdb", "write -P 1 0 1M")
    async with make_source(bed.vm, bed.folder, socket=bed.socket).snapshot():
        bed.between("qom-set", "vdb", mirror_of_our_filter)
    assert bed.happened
    await guest_io(bed.vm, "vdb", "write -P 2 512k 1M")
    await pivot(bed)
    assert (bed.folder / "target.raw").read_bytes()[: 3 * MIB // 2] == b"\x01" * (MIB // 2) + b"\x02" * MIB


@pytest.mark.one_qemu
@pytest.mark.parametrize("act", [backup, resize], ids=lambda act: act.__name__)
async def test_what_begins_while_the_guest_is_slow_to_freeze_is_found(bed: Bed, act: Act) -> None:
    await bed.run("cont")
    guest = Guest()

    async def answer(command: str, arguments: dict[str, object]) -> bytes:
        if command == "guest-fsfreeze-freeze":
            await act(bed)
            bed.happened = True
        return await guest.answer(command, arguments)

    async with (
        fake_agent(bed.folder / "agent", answer) as agent,
        refused(bed, "somebody is at work"),
        make_source(bed.vm, bed.folder, socket=bed.socket, agent=agent).snapshot(),
    ):
        pytest.fail("was not refused")
    assert guest.thawed.is_set()
    await cancel(bed)
