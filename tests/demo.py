# SPDX-License-Identifier: LGPL-2.1-or-later
"""`./run demo`: a small VM is backed up with restic through the mount, changed, backed up again, restored, compared."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.harness.disk import MIB, Disk
from tests.harness.qemu import selected
from tests.harness.vm import Vm, running_vm

QFSBACKUP = Path(sys.executable).with_name("qfsbackup")
FILES = {"/data/before": "written before the first backup", "/data/changed": "as it was at the first backup"}


def step(text: str) -> None:
    print(f"\n=== {text}", flush=True)


async def command(words: Sequence[str | Path], environment: dict[str, str]) -> None:
    """Show a command as a person would type it, and run it."""
    print("$", *words, flush=True)
    await trio.run_process([str(word) for word in words], env={**os.environ, **environment})


async def back_up(vm: Vm, directory: Path, environment: dict[str, str]) -> None:
    options = f"target=demo,state={directory},agent={vm.agent},vm=demo"
    run: list[str | Path] = [QFSBACKUP, "run", vm.qmp, "-o", options, "--"]
    await command([*run, "restic", "backup", "chunks", "config", "vm.json"], environment)


async def fill(vm: Vm) -> None:
    """A file system on each disk, with a file that stays, one that will change, and some bulk."""
    for number, disk in enumerate(("vda", "vdb")):
        await vm.shell.run(f"mkfs.ext4 -q /dev/{disk} && mkdir -p /mnt{number} && mount /dev/{disk} /mnt{number}")
        await vm.shell.run(f"mkdir /mnt{number}/data && head -c 20000000 /dev/urandom > /mnt{number}/data/bulk")
        for path, text in FILES.items():
            await vm.shell.run(f"echo '{text}' > /mnt{number}{path}")


async def change(vm: Vm) -> None:
    for number in range(2):
        await vm.shell.run(f"echo 'changed after the first backup' > /mnt{number}/data/changed")
        await vm.shell.run(f"echo 'new' > /mnt{number}/data/new")


async def guest_digests(vm: Vm, number: int) -> dict[str, str]:
    """SHA-256 of each file as the guest sees it."""
    lines = (await vm.shell.run(f"cd /mnt{number} && sha256sum data/*")).splitlines()
    return {name: digest for digest, name in (line.split() for line in lines)}


def image_digests(image: Path, names: Sequence[str]) -> dict[str, str]:
    """The same, read from a restored image with e2fsprogs."""
    subprocess.run(["e2fsck", "-fn", image], check=True, capture_output=True)
    result = {}
    for name in names:
        content = subprocess.run(["debugfs", "-R", f"cat /{name}", image], check=True, capture_output=True).stdout
        result[name] = hashlib.sha256(content).hexdigest()
    return result


async def demo(directory: Path) -> None:
    environment = {
        "RESTIC_REPOSITORY": str(directory / "repository"),
        "RESTIC_PASSWORD": "demo",
        "RESTIC_CACHE_DIR": str(directory / "cache"),
    }
    restored = directory / "restored"
    disks = [
        Disk("system", directory / "system.raw", 128 * MIB),
        Disk("data", directory / "data.qcow2", 128 * MIB, format="qcow2"),
    ]
    step("a VM boots, with two disks and the guest agent")
    async with running_vm(selected()[0], directory, disks, guest=True, agent=True) as vm:
        await fill(vm)
        step("first backup: restic reads the frozen instant while the VM runs")
        await command(["restic", "init", "-q"], environment)
        await back_up(vm, directory, environment)
        step("the guest changes a little, and is backed up again: restic reads only the chunks that changed")
        await change(vm)
        await back_up(vm, directory, environment)
        digests = [await guest_digests(vm, number) for number in range(2)]
    step("restore, and compare with what the guest had")
    await command(["restic", "restore", "-q", "latest", "--target", restored], environment)
    for number, disk in enumerate(disks):
        image = directory / f"restored-{disk.id}.raw"
        await command([QFSBACKUP, "restore", next(restored.rglob(f"chunks/{disk.id}")), image], environment)
        found = image_digests(image, list(digests[number]))
        if found != digests[number]:
            raise SystemExit(f"{disk.id}: the restored files differ: {found}, the guest had {digests[number]}")
        print(f"{disk.id}: file system clean, {len(found)} files as the guest had them")
    step("all is as it should be")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="qfsbackup-demo-") as temporary:
        trio.run(demo, Path(temporary))
