# SPDX-License-Identifier: LGPL-2.1-or-later
"""The situations that mistakes are made in (tests/test_mistakes.py has the table): what stands there before, and that
the same stands there afterwards."""

import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from tests.e2e.support import runtime_folder
from tests.harness.disk import MIB, Disk
from tests.harness.files import opened_to_all
from tests.harness.monitor import Lines
from tests.harness.mount import PROGRAM, Result, command, mounted, processes_of, taken_away
from tests.harness.qemu import Qemu
from tests.harness.vm import Vm, running_vm
from tests.vm.support import guest_io, held


@dataclass(frozen=True)
class Place:
    """A folder to make mistakes in, and a VM if the situation has one."""

    folder: Path
    vm: Vm | None = None

    @property
    def mountpoint(self) -> Path:
        return self.folder / "mnt"

    @property
    def qmp(self) -> Path:
        return self.vm.qmp if self.vm else self.folder / "vm.qmp"

    async def do(self, line: str) -> Result:
        """Run a line of sh there."""
        return await command("/bin/sh", "-c", line, cwd=self.folder, environment=self.environment())

    def environment(self) -> dict[str, str]:
        """What a line of sh knows there."""
        places = {"QMP": str(self.qmp), "MNT": str(self.mountpoint)}
        return {**os.environ, **places, "PATH": f"{PROGRAM.parent}:{os.environ['PATH']}"}

    async def left(self) -> dict[str, Any]:
        """All that a mistake could leave: in QEMU, the mounts, the processes."""
        found: dict[str, Any] = {"mounts": self._mounts(), "processes": processes_of(self.qmp, self.mountpoint)}
        if self.vm:
            found |= await held(self.vm)
            with contextlib.suppress(LookupError):
                found["NBD server"] = runtime_folder(self.vm)
        return found

    def _mounts(self) -> list[str]:
        return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(self.folder) in line]


Situation = Callable[[Qemu, Path], AbstractAsyncContextManager[Place]]


@contextlib.asynccontextmanager
async def no_vm(_qemu: Qemu, folder: Path) -> AsyncIterator[Place]:
    """There is nothing at $QMP."""
    place = Place(folder)
    place.mountpoint.mkdir()
    async with taken_away(place.mountpoint, place.qmp):
        yield place


@contextlib.asynccontextmanager
async def a_vm(qemu: Qemu, folder: Path) -> AsyncIterator[Place]:
    """A VM with a raw disk vda and a qcow2 disk vdb, some data on both, whose CPUs do not run."""
    disks = [Disk("vda", folder / "vda.raw", 4 * MIB), Disk("vdb", folder / "vdb.qcow2", 4 * MIB, format="qcow2")]
    async with running_vm(qemu, folder, disks) as vm:
        for disk in disks:
            await guest_io(vm, disk.id, "write -P 7 1M 256k")
        place = Place(folder, vm)
        place.mountpoint.mkdir()
        async with taken_away(place.mountpoint, place.qmp):
            yield place


@contextlib.asynccontextmanager
async def a_mounted_vm(qemu: Qemu, folder: Path) -> AsyncIterator[Place]:
    """The same, mounted at $MNT; all may enter the folders above, as on most machines."""
    async with a_vm(qemu, folder) as place, mounted(place.qmp, place.mountpoint, f"fleece={folder}"):
        with opened_to_all(folder):
            yield place


@contextlib.asynccontextmanager
async def a_vm_mounted_elsewhere(qemu: Qemu, folder: Path) -> AsyncIterator[Place]:
    """The same in a mount namespace of its own, as a container has it."""
    async with a_vm(qemu, folder) as place:
        script = 'qfsbackup mount "$QMP" "$MNT" && echo mounted && read end && umount "$MNT"'
        words = ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-c", script]
        async with spoken_to(words, place.environment()) as process:
            assert await process.says() == "mounted"
            yield place


@contextlib.asynccontextmanager
async def a_backup_at_work(qemu: Qemu, folder: Path) -> AsyncIterator[Place]:
    """`qfsbackup run` at $MNT, whose command does not end."""
    async with a_vm(qemu, folder) as place:
        script = 'qfsbackup run "$QMP" --mountpoint "$MNT" -- sh -c "echo runs; read end"'
        async with spoken_to(["/bin/sh", "-c", script], place.environment()) as process:
            assert await process.says() == "runs"
            yield place


@contextlib.asynccontextmanager
async def a_vm_of_others(qemu: Qemu, folder: Path) -> AsyncIterator[Place]:
    """Another program has the VM's QMP socket: this test's."""
    async with a_vm(qemu, folder) as place, await trio.open_unix_socket(str(place.qmp)) as stream:
        await stream.receive_some(1)
        yield place


class Spoken:
    """A child that says lines and waits for ours."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdout
        self._lines = Lines(process.stdout)

    async def says(self) -> str:
        """Its next line."""
        return (await self._lines.next() or b"").decode()


@contextlib.asynccontextmanager
async def spoken_to(words: list[str], environment: dict[str, str]) -> AsyncIterator[Spoken]:
    """A child for the length of the block, which ends when its standard input gets a line."""
    process = await trio.lowlevel.open_process(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    assert process.stdin
    try:
        yield Spoken(process)
    finally:
        with trio.move_on_after(20, shield=True), contextlib.suppress(trio.BrokenResourceError):
            await process.stdin.send_all(b"end\n")
            await process.wait()
