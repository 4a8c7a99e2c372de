# SPDX-License-Identifier: LGPL-2.1-or-later
"""The situations that mistakes are made in (tests/test_mistakes.py has the table): what stands there before, and that
the same stands there afterwards."""

import contextlib
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.support import runtime_folder
from tests.harness.disk import MIB, Disk
from tests.harness.mount import PROGRAM, Result, command, mounted, processes_of, taken_away
from tests.harness.qemu import Qemu
from tests.harness.vm import Vm, running_vm
from tests.vm.support import held


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
        environment = {
            "PATH": f"{PROGRAM.parent}:{os.environ['PATH']}",
            "QMP": str(self.qmp),
            "MNT": str(self.mountpoint),
        }
        return await command("/bin/sh", "-c", line, cwd=self.folder, environment=environment)

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
    """A VM with a raw disk vda and a qcow2 disk vdb, whose CPUs do not run."""
    disks = [Disk("vda", folder / "vda.raw", 4 * MIB), Disk("vdb", folder / "vdb.qcow2", 4 * MIB, format="qcow2")]
    async with running_vm(qemu, folder, disks) as vm:
        place = Place(folder, vm)
        place.mountpoint.mkdir()
        async with taken_away(place.mountpoint, place.qmp):
            yield place


@contextlib.asynccontextmanager
async def a_mounted_vm(qemu: Qemu, folder: Path) -> AsyncIterator[Place]:
    """The same, mounted without a target at ./first."""
    async with a_vm(qemu, folder) as place, mounted(place.qmp, folder / "first", f"fleece={folder}"):
        yield place
