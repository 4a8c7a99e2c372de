# SPDX-License-Identifier: LGPL-2.1-or-later
"""A disk of 65,536 chunks looks the same to `find` in two mounts, but for what the guest wrote in between."""

from pathlib import Path

from tests.harness.disk import Disk
from tests.harness.mount import Mount, command, mounted, qfsbackup
from tests.harness.qemu import Qemu
from tests.harness.vm import running_vm
from tests.vm.support import guest_io

SIZE = 256 << 30
CHUNK = 4 << 20


async def listing(mount: Mount) -> list[str]:
    """Path, size, mtime, ctime and inode of every chunk."""
    done = await command("find", ".", "-type", "f", "-printf", r"%p %s %T@ %C@ %i\n", cwd=mount.path / "chunks")
    assert (done.code, done.stderr) == (0, "")
    return sorted(done.stdout.splitlines())


async def test_65536_chunks_are_the_same_in_two_mounts(qemu: Qemu, tmp_path: Path) -> None:
    async with running_vm(qemu, tmp_path, [Disk("vda", tmp_path / "vda.raw", SIZE)]) as vm:
        options = f"target=nas,state={tmp_path}"
        async with mounted(vm.qmp, tmp_path / "mnt", options) as mount:
            first = await listing(mount)
            assert len(first) == 65536
            assert len({line.split()[-1] for line in first}) == 65536  # inodes
            assert all(line.split()[1] == str(CHUNK) for line in first)
            assert (await qfsbackup("commit", mount.path)).code == 0
        for number in (0, 40000, 65535):
            await guest_io(vm, "vda", f"write -P 1 {number * CHUNK + 4096} 512")
        async with mounted(vm.qmp, tmp_path / "mnt", options) as mount:
            second = await listing(mount)
        known = set(first)
        moved = [line.split()[0] for line in second if line not in known]
        assert moved == ["./vda/000/00000000", "./vda/156/00040000", "./vda/255/00065535"]
        inodes = [[line.split()[-1] for line in one] for one in (first, second)]
        assert inodes[0] == inodes[1]
