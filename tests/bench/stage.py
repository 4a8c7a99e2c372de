# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all contenders read: the disks of one paused VM (`-S`: a running vCPU would spoil the figures).

`full` has no zeros, `sparse` is mostly holes; both are raw files, in memory where there is room. The QEMU is
the newest there is, unless QEMU (the variable) says otherwise.
"""

import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from tests.harness.disk import Disk
from tests.harness.mount import Mount, aside, mounted
from tests.harness.qemu import selected
from tests.harness.vm import Vm, running_vm

from .scale import MIB, Scale

BLOCK = 4 * MIB


@dataclass(frozen=True)
class Stage:
    """A VM with the disks `full` and `sparse`; files of the run go to `directory`."""

    vm: Vm
    directory: Path
    scale: Scale

    def mounted(self, *options: str) -> contextlib.AbstractAsyncContextManager[Mount]:
        """A snapshot, of both disks unless an option says otherwise, at the same path each time."""
        return mounted(
            self.vm.qmp, self.directory / "mnt", f"fleece={self.directory}", f"state={self.directory}", *options
        )


@contextlib.asynccontextmanager
async def staged(directory: Path, scale: Scale) -> AsyncIterator[Stage]:
    """Make the disks and start the VM."""
    disks = [
        Disk("full", await aside(make_full, directory / "full.raw", scale.full), scale.full),
        Disk("sparse", await aside(_make_sparse, directory / "sparse.raw", scale), scale.sparse),
    ]
    async with running_vm(selected()[-1], directory, disks, name="bench") as vm:
        yield Stage(vm, directory, scale)


def make_full(path: Path, size: int) -> Path:
    """A file without zeros; the same random block again and again, which no reader here notices."""
    block = os.urandom(BLOCK)
    with path.open("wb") as file:
        for _ in range(size // BLOCK):
            file.write(block)
    return path


def _make_sparse(path: Path, scale: Scale) -> Path:
    """Pieces of random data that differ, or restic would find each but once."""
    with path.open("wb") as file:
        file.truncate(scale.sparse)
        for offset in data_pieces(scale):
            file.seek(offset)
            file.write(os.urandom(scale.piece))
    return path


def data_pieces(scale: Scale) -> range:
    """Where the sparse disk has data."""
    return range(0, scale.sparse, scale.sparse // (scale.data // scale.piece))
