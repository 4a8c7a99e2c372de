# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rows of the guest: how long its writes take while nobody reads its disk, and during a full and a later backup;
how long it stands still for a snapshot.
"""

from functools import partial
from pathlib import Path

import trio

from qfsbackup.tasks import background
from tests.harness.disk import Disk
from tests.harness.mount import Mount, aside, mounted
from tests.harness.qemu import selected
from tests.harness.shell import Writes, writing
from tests.harness.vm import Vm, running_vm

from .contenders import US
from .measure import Sample
from .rows import Samples
from .scale import Scale
from .stage import make_full

GUEST = ("guest-median", "guest-p99", "guest-max", "guest-rate", "guest-pause")
ALONE, FULL, DIRTY = "no backup", "full backup", "access=dirty backup"
IDLE_DISKS = 4


async def measure_guest(directory: Path, scale: Scale, samples: Samples) -> None:
    """A booted guest writes to a disk without zeros, and flushes each write; alone, and during both kinds of backup."""
    disk = Disk("guest", await aside(make_full, directory / "guest.raw", scale.guest), scale.guest)
    options = f"fleece={directory},state={directory},target=bench"
    async with running_vm(selected()[-1], directory, [disk], guest=True, name="guest") as vm:
        for _ in range(scale.rounds):
            _add(samples, ALONE, await _write(vm, scale), scale)
            async with mounted(vm.qmp, directory / "guest", options) as mount:
                await _during(mount, "images/guest.raw", FULL, vm, scale, samples)
                await aside((mount.path / ".qfsbackup/control").write_text, "commit\n")
            await _write(vm, scale)  # what is dirty
            async with mounted(vm.qmp, directory / "guest", f"{options},access=dirty") as mount:
                await _during(mount, "delta/guest.raw", DIRTY, vm, scale, samples)

    await _measure_pause(directory, scale, samples)


async def _measure_pause(directory: Path, scale: Scale, samples: Samples) -> None:
    """A booted guest that is not frozen, and does nothing with its disks."""
    disks = [Disk(f"vd{letter}", directory / f"idle-{letter}.raw") for letter in "abcd"[:IDLE_DISKS]]
    async with running_vm(selected()[-1], directory, disks, guest=True, name="idle") as vm:
        for _ in range(scale.rounds):
            async with mounted(vm.qmp, directory / "idle", f"fleece={directory}") as mount:
                pause = (await mount.status())["pause_ms"]
            samples.add("guest-pause", US, _figure(pause))


async def _during(mount: Mount, read: str, name: str, vm: Vm, scale: Scale, samples: Samples) -> None:
    async with background(partial(_read_for_ever, mount.path / read)):
        _add(samples, name, await _write(vm, scale), scale)


async def _write(vm: Vm, scale: Scale) -> Writes:
    async with writing(vm.shell, "-d /dev/vda") as writes:
        await trio.sleep(scale.guest_seconds)
    writes.check()
    return writes


async def _read_for_ever(file: Path) -> None:
    while True:
        await trio.run_process(["dd", f"if={file}", "of=/dev/null", "bs=1M", "status=none"])


def _add(samples: Samples, name: str, writes: Writes, scale: Scale) -> None:
    samples.add("guest-median", name, _figure(writes.p50_us / 1000))
    samples.add("guest-p99", name, _figure(writes.p99_us / 1000))
    samples.add("guest-max", name, _figure(writes.max_us / 1000))
    samples.add("guest-rate", name, _figure(writes.writes / scale.guest_seconds))


def _figure(value: float) -> Sample:
    return Sample(value, 0, 0, 0, 0, 0)
