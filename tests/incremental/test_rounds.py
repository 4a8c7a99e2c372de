# SPDX-License-Identifier: LGPL-2.1-or-later
"""A booted guest writes between and during the backups of three tools; backups are killed and rolled back, the VM is
restarted: what each committed round restores is the disks of its instant, byte for byte.

The disks are recorded without the product: a proxy holds it behind `stop`, and the test copies the disk files.
"""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.harness.disk import MIB, Disk
from tests.harness.files import assert_same
from tests.harness.mount import aside, qfsbackup, taken_away
from tests.harness.qemu import Qemu
from tests.harness.qmp_proxy import running_proxy
from tests.harness.shell import writing
from tests.harness.vm import Vm, running_vm
from tests.incremental.support import CHUNK, DISKS, Bed, Round, chunk_names
from tests.incremental.tools import Borg, Restic, Rsync, Tool

SIZES = {"vda": 8 * MIB, "vdb": 4 * MIB}
SLOWLY = "bwlimit=256k"  # so that a kill comes half-way
HALF_WAY = (
    """until grep -q '"nbd_bytes": [1-9][0-9]\\{5,\\}' .qfsbackup/status.json || ! kill -0 $tool; do sleep 0.05; done"""
)
KILL_TOOL = f"( COMMAND ) & tool=$!; {HALF_WAY}; kill -9 $(ps -o pid= --ppid $tool) $tool; wait $tool"
KILL_WORKER = (
    f"( COMMAND ) & tool=$!; {HALF_WAY}; "
    """kill -9 $(sed -n 's/^  "pid": \\([0-9]*\\),/\\1/p' .qfsbackup/status.json); wait $tool"""
)

How = Literal["commit", "roll back", "kill tool", "kill worker"]
ROUNDS: list[dict[type, How]] = [
    {Restic: "commit", Borg: "commit", Rsync: "commit"},
    {Restic: "kill tool", Borg: "roll back", Rsync: "kill worker"},
    {Restic: "commit", Borg: "kill tool", Rsync: "commit"},
    {Restic: "roll back", Borg: "commit", Rsync: "kill tool"},
    {Restic: "commit", Borg: "commit", Rsync: "commit"},
]
RESTART_BEFORE = 3


def disks(folder: Path) -> list[Disk]:
    """A raw disk, which loses its bitmaps at a restart, and a qcow2 disk, which keeps them."""
    vda = Disk("vda", folder / "vda.img", SIZES["vda"])
    return [vda, Disk("vdb", folder / "vdb.img", SIZES["vdb"], format="qcow2")]


@contextlib.asynccontextmanager
async def booted(qemu: Qemu, folder: Path, boot: int) -> AsyncIterator[Vm]:
    """The guest, with its file system on vda and vdb written by the tests' writer; it ends with a clean shutdown."""
    async with running_vm(qemu, folder, disks(folder), guest=True, name=f"boot{boot}") as vm:
        make = "mkfs.ext4 -q -b 1024 /dev/vda && " if boot == 0 else ""
        await vm.shell.run(f"{make}mkdir -p /mnt/vda && mount /dev/vda /mnt/vda && touch /run/busy")
        busy = "dd if=/dev/urandom of=/mnt/vda/busy bs=3001 count=9 conv=fsync 2> /run/null; usleep 50000"
        await vm.shell.run(f"( while [ -e /run/busy ]; do {busy}; done; touch /run/idle ) > /run/null 2>&1 &")
        async with writing(vm.shell, f"-s {boot + 1} -w 3145728:262144 /dev/vdb") as writes:
            yield vm
            await vm.shell.run("rm /run/busy; while [ ! -e /run/idle ]; do usleep 20000; done; umount /mnt/vda")
        writes.check()
        await vm.monitor.execute("quit")
        assert await vm.process.wait() == 0


async def change(vm: Vm, number: int) -> None:
    """What the guest does between two rounds: files come and go, and are trimmed; vdb gets writes of any alignment."""
    files = f"dd if=/dev/urandom of=/mnt/vda/{number} bs=3001 count=70 && rm -f /mnt/vda/{number - 1}"
    await vm.shell.run(f"{files} && sync && fstrim /mnt/vda && writer -n 12 -s {number + 9} -w 0:1048576 /dev/vdb")


async def back_up(lab: Bed, tool: Tool, how: How, before: Path, copies: Path) -> Round:
    """One round, through a proxy that has the disks copied at the instant."""
    round_ = Round(tool, lab.folder / f"{tool.name}.round", lab.vm.qemu)

    async def on_reply(name: str, _: dict[str, Any], _reply: dict[str, Any]) -> None:
        if name == "stop" and how == "commit":
            for disk in DISKS:
                await lab.disk(disk, copies / f"{disk}.instant")

    lab.qmp = before
    before.unlink(missing_ok=True)  # noqa: ASYNC240 - a socket
    command, code, more = tool.command(), 0, list[str]()
    if how == "roll back":
        code = 3
    elif how == "kill tool":
        command, code, more = KILL_TOOL.replace("COMMAND", command), 137, [SLOWLY]
    elif how == "kill worker":
        command, code, more = KILL_WORKER.replace("COMMAND", command), 125, [SLOWLY]
    script = round_.script(command, "exit 3" if how == "roll back" else "") if code in (0, 3) else command
    async with running_proxy(lab.vm.qmp, before, on_reply=on_reply):
        done = await lab.run(tool.name, script, "vm=guest", *more, code=code)
    assert "Traceback" not in done.stderr, done.stderr
    return round_


async def check_restored(lab: Bed, tool: Tool, name: str) -> None:
    """What the tool has of its newest backup is the record."""
    folder = await tool.restore(lab.folder / f"{tool.name}.{name}")
    for disk in DISKS:
        image = lab.folder / f"{disk}.restored"
        done = await qfsbackup("restore", folder / "chunks" / disk, image, "--force")
        assert done.code == 0, done
        await aside(assert_same, image, lab.folder / f"{disk}.instant")


def check_read(round_: Round, *, first: bool, restarted: bool) -> None:
    """The tool took the dirty chunks and no others, and nothing else was read from QEMU."""
    assert round_.bitmaps() == {
        "vda": "new" if first else "invalid" if restarted else "reuse",
        "vdb": "new" if first else "reuse",
    }
    every = {name for disk, size in SIZES.items() for name in chunk_names(disk, range(size // CHUNK))}
    dirty = round_.dirty_chunks("vda") | round_.dirty_chunks("vdb")
    assert round_.tool.read(round_.log) == dirty, round_.log
    assert round_.tool.skipped(round_.log) == every - dirty
    round_.check_nbd_bytes(len(dirty))
    assert first or len(dirty) < len(every)


@pytest.mark.one_qemu  # it takes minutes; what differs between QEMUs is in tests/vm/test_bitmaps.py and below here
@pytest.mark.timeout(400)
async def test_every_committed_round_restores_to_the_disks_of_its_instant(qemu: Qemu, tmp_path: Path) -> None:
    tools: list[Tool] = [Restic(tmp_path), Borg(tmp_path), Rsync(tmp_path)]
    for tool in tools:
        await tool.setup()
    committed = dict.fromkeys(tools, -1)  # the boot at the last commit
    proxy = tmp_path / "guest.proxy"
    async with taken_away(tmp_path / "mnt", proxy):
        for boot, rounds in enumerate([ROUNDS[:RESTART_BEFORE], ROUNDS[RESTART_BEFORE:]]):
            async with booted(qemu, tmp_path, boot) as vm:
                lab = Bed(vm, tmp_path)
                for number, behaviours in enumerate(rounds, boot * RESTART_BEFORE):
                    for tool in tools:
                        await change(vm, number * len(tools) + tools.index(tool))
                        how = behaviours[type(tool)]
                        round_ = await back_up(lab, tool, how, proxy, tmp_path)
                        if how in ("commit", "roll back"):
                            check_read(round_, first=committed[tool] < 0, restarted=committed[tool] != boot)
                        if how == "commit":
                            committed[tool] = boot
                            await check_restored(lab, tool, str(number))
