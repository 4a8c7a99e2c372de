# SPDX-License-Identifier: LGPL-2.1-or-later
"""What people back up with reads a mounted VM that goes on writing, and what it restores is the disk at the instant."""

import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness.disk import MIB, Disk
from tests.harness.files import allocated, assert_same, data_extents, make_random
from tests.harness.mount import Mount, Result, aside, command, mounted
from tests.harness.qemu import Qemu, run_img
from tests.harness.vm import Vm, running_vm
from tests.vm.support import guest_io

KIB = 1024
CLUSTER = 64 * KIB
SIZE = 8 * MIB + 3 * 512  # no multiple of anything a tool likes
TIB = 1 << 40


@dataclass(frozen=True)
class Backup:
    """A mounted VM, the bytes of its disks at the instant, and a folder for what a tool makes of them."""

    vm: Vm
    mount: Mount
    expected: dict[str, Path]
    work: Path

    async def run(
        self, *words: str | Path, cwd: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> Result:
        """Run a tool; it must be content."""
        done = await command(*words, cwd=cwd, environment=environment)
        assert done.code == 0, done
        return done

    async def check(self, folder: Path, *, sparse: bool = False) -> None:
        """The restored images in `folder` are the disks, and where it was asked for take no more room than these."""
        for name, expected in self.expected.items():
            restored = folder / f"{name}.raw"
            await aside(assert_same, restored, expected)
            if sparse:
                assert allocated(restored) <= allocated(expected) + MIB


@pytest.fixture
async def backup(qemu: Qemu, tmp_path: Path) -> AsyncIterator[Backup]:
    """A sparse raw disk and a qcow2 one; the guest has overwritten parts of both since the instant."""
    expected = {"vda": tmp_path / "vda.expected", "vdb": tmp_path / "vdb.expected"}
    make_random(expected["vda"], SIZE, hole_every=2, piece=256 * KIB)
    make_random(expected["vdb"], 4 * MIB, seed=2)
    await run_img(qemu, "convert", "-f", "raw", "-O", "raw", expected["vda"], tmp_path / "vda.raw")
    await run_img(qemu, "convert", "-f", "raw", "-O", "qcow2", expected["vdb"], tmp_path / "vdb.qcow2")
    disks = [Disk("vda", tmp_path / "vda.raw"), Disk("vdb", tmp_path / "vdb.qcow2", format="qcow2")]
    work = tmp_path / "work"
    work.mkdir()
    async with running_vm(qemu, tmp_path, disks) as vm, mounted(vm.qmp, tmp_path / "mnt") as mount:
        await guest_io(vm, "vda", "write -P 7 128k 1M")
        await guest_io(vm, "vda", "write -z -u 2M 1M")
        await guest_io(vm, "vdb", "write -P 7 1M 100k")
        yield Backup(vm, mount, expected, work)
        status = await mount.status()
        assert (status["state"], [disk["read_errors"] for disk in status["disks"].values()]) == ("ready", [0, 0])


@pytest.mark.one_qemu
async def test_dd(backup: Backup) -> None:
    for arguments in ("bs=1M", "bs=4k iflag=direct", "bs=1000", "bs=256k iflag=fullblock conv=sparse"):
        for name, expected in backup.expected.items():
            output = backup.work / f"{name}.raw"
            output.unlink(missing_ok=True)
            source = f"if={backup.mount.image(name)}"
            await backup.run("dd", source, f"of={output}", *arguments.split(), "status=none")
            os.truncate(output, expected.stat().st_size)  # conv=sparse does not write a hole at the end
        await backup.check(backup.work, sparse="sparse" in arguments)


async def test_cp(backup: Backup) -> None:
    for sparse in ("auto", "always", "never"):
        for name in backup.expected:
            await backup.run("cp", f"--sparse={sparse}", backup.mount.image(name), backup.work)
        await backup.check(backup.work, sparse=sparse != "never")


@pytest.mark.one_qemu
@pytest.mark.parametrize("sparse", [False, True])
async def test_rsync(backup: Backup, sparse: bool) -> None:
    options = "-aS" if sparse else "-a"
    await backup.run("rsync", options, f"{backup.mount.path}/images/", backup.work)
    await backup.check(backup.work, sparse=sparse)
    again = await backup.run("rsync", options, "-i", f"{backup.mount.path}/images/", backup.work)
    assert again.stdout == ""  # nothing changed: nothing is read again


@pytest.mark.one_qemu
@pytest.mark.parametrize("sparse", [False, True])
async def test_tar(backup: Backup, sparse: bool) -> None:
    archive = backup.work / "images.tar"
    options = ["-S"] if sparse else []
    made = await backup.run("tar", *options, "-C", backup.mount.path / "images", "-cf", archive, ".")
    assert made.stderr == ""  # no "file changed as we read it"
    await backup.run("tar", "-C", backup.work, "-xf", archive)
    await backup.check(backup.work, sparse=sparse)


@pytest.mark.one_qemu
async def test_restic(backup: Backup) -> None:
    environment = {
        "RESTIC_REPOSITORY": str(backup.work / "repository"),
        "RESTIC_PASSWORD": "test",
        "RESTIC_CACHE_DIR": str(backup.work / "cache"),
    }
    await backup.run("restic", "init", "-q", environment=environment)
    await backup.run(
        "restic", "backup", "-q", "images", "vm.json", "config", cwd=backup.mount.path, environment=environment
    )
    await backup.run("restic", "check", "-q", "--read-data", environment=environment)
    await backup.run("restic", "restore", "-q", "latest", "--target", backup.work, environment=environment)
    [found] = (path.parent for path in backup.work.rglob("vda.raw"))
    await backup.check(found)


@pytest.mark.one_qemu
@pytest.mark.parametrize("sparse", [False, True])
async def test_borg(backup: Backup, sparse: bool) -> None:
    options = ["--sparse"] if sparse else []
    environment = {"BORG_REPO": str(backup.work / "repository"), "BORG_BASE_DIR": str(backup.work)}
    await backup.run("borg", "init", "-e", "none", environment=environment)
    await backup.run(
        "borg", "create", *options, "::one", "images", "vm.json", cwd=backup.mount.path, environment=environment
    )
    await backup.run("borg", "extract", *options, "::one", cwd=backup.work, environment=environment)
    await backup.check(backup.work / "images")  # borg makes holes of whole chunks only


@pytest.mark.one_qemu
async def test_qemu_img(backup: Backup) -> None:
    for name, expected in backup.expected.items():
        await run_img(backup.vm.qemu, "compare", "-f", "raw", "-F", "raw", backup.mount.image(name), expected)
        qcow2 = backup.work / name
        await run_img(backup.vm.qemu, "convert", "-f", "raw", "-O", "qcow2", backup.mount.image(name), qcow2)
        await run_img(backup.vm.qemu, "compare", "-f", "qcow2", "-F", "raw", qcow2, expected)
        await run_img(backup.vm.qemu, "convert", "-f", "qcow2", "-O", "raw", qcow2, backup.work / f"{name}.raw")
    await backup.check(backup.work)


@pytest.mark.timeout(60)
async def test_a_sparse_tib_is_copied_by_its_data(qemu: Qemu, tmp_path: Path) -> None:
    """100 MiB in 25 pieces all over 1 TiB; reading all of it would take hours."""
    disk = tmp_path / "vda.raw"
    data = make_random(tmp_path / "piece", 4 * MIB).read_bytes()
    places = [number * (TIB // 25 // MIB * MIB) for number in range(25)]
    with disk.open("wb") as file:
        file.truncate(TIB)
        for place in places:
            file.seek(place)
            file.write(data)
    async with running_vm(qemu, tmp_path, [Disk("vda", disk)]) as vm, mounted(vm.qmp, tmp_path / "mnt") as mount:
        copy = tmp_path / "copy"
        done = await command("cp", "--sparse=auto", mount.image("vda"), copy)
        assert done.code == 0, done
        extents = await aside(data_extents, mount.image("vda"))
        status = await mount.status()
    assert copy.stat().st_size == TIB
    assert extents == data_extents(copy) == [(place, len(data)) for place in places]
    with copy.open("rb") as file:
        for place in places:
            file.seek(place)
            assert file.read(len(data)) == data
    assert status["disks"]["vda"]["nbd_bytes"] < 2 * 25 * len(data)


async def test_a_punch_frees_the_fleecing_file_and_touches_nothing_else(backup: Backup) -> None:
    image, expected = backup.mount.image("vda"), bytearray(backup.expected["vda"].read_bytes())
    before = (await backup.mount.fresh_status())["disks"]["vda"]
    assert before["fleecing_used"] >= MIB
    start, length = 256 * KIB, 512 * KIB
    await backup.run("fallocate", "-p", "-o", str(start), "-l", str(length), image)
    expected[start : start + length] = bytes(length)
    assert await aside(image.read_bytes) == expected
    after = (await backup.mount.fresh_status())["disks"]["vda"]
    # Half of the range was a hole at the instant; QEMU may or may not have stored its zeros.
    assert after["fleecing_used"] <= before["fleecing_used"] - length // 2
    assert (after["punched"], after["trimmed"]) == (length, length)
    await guest_io(backup.vm, "vda", f"write -P 9 {start} {length}")  # no longer worth a copy
    assert (await backup.mount.fresh_status())["disks"]["vda"]["fleecing_used"] == after["fleecing_used"]
    assert await aside(image.read_bytes) == expected
    await backup.run("fallocate", "-p", "-o", "0", "-l", str(TIB), image)  # all of it, and beyond
    assert (await backup.mount.fresh_status())["disks"]["vda"]["fleecing_used"] == 0
    assert await aside(image.read_bytes) == bytes(len(expected))
    assert (image.stat().st_size, image.stat().st_blocks) == (SIZE, 1)


async def test_punches_that_are_not_aligned_add_up_to_whole_clusters(backup: Backup) -> None:
    """QEMU 7.2 aborts on a trim that is not aligned; the harness would notice."""
    image, expected = backup.mount.image("vda"), bytearray(backup.expected["vda"].read_bytes())
    step, start, end = 10_000, 512 * KIB + 5, 768 * KIB
    for place in [*range(start, end - step, 2 * step), *range(start + step, end - step, 2 * step)]:
        await backup.run("fallocate", "-p", "-o", str(place), "-l", str(step), image)
        expected[place : place + step] = bytes(step)
    status = (await backup.mount.status())["disks"]["vda"]
    assert status["punched"] % step == 0
    assert status["punched"] > 2 * CLUSTER
    assert status["trimmed"] >= 2 * CLUSTER
    assert status["trimmed"] % CLUSTER == 0
    assert await aside(image.read_bytes) == expected
