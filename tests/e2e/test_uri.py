# SPDX-License-Identifier: LGPL-2.1-or-later
"""A plain NBD server as the source: qemu-nbd, qemu-storage-daemon, nbdkit, mounted with the real command."""

import os
from pathlib import Path

import pytest
import trio

from tests.fuse.support import PUNCH_HOLE, errno_of, fallocate
from tests.harness.disk import MIB
from tests.harness.files import assert_same, make_random
from tests.harness.mount import aside, mounted, qfsbackup
from tests.harness.nbd_server import make_certificates, nbdkit, qemu_nbd, storage_daemon
from tests.harness.qemu import Qemu, run_img

pytestmark = pytest.mark.one_qemu
KIB = 1024


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_random(tmp_path / "image", 4 * MIB, hole_every=3)


async def test_an_export_is_mounted_and_can_be_punched(qemu: Qemu, tmp_path: Path, image: Path) -> None:
    expected = bytearray(await aside(image.read_bytes))
    async with (
        qemu_nbd(qemu, tmp_path, image, options=["--discard=unmap"]) as server,
        mounted(server.uri, tmp_path / "mnt") as mount,
    ):
        [path] = await aside(list, (mount.path / "images").iterdir())
        assert await aside(path.read_bytes) == expected
        await aside(fallocate, path, PUNCH_HOLE, 128 * KIB, 64 * KIB)
        expected[128 * KIB : 192 * KIB] = bytes(64 * KIB)
        assert await aside(path.read_bytes) == expected
    assert await aside(image.read_bytes) == expected  # the server's own file: here a punch is a discard


async def test_a_read_only_export_cannot_be_punched(qemu: Qemu, tmp_path: Path, image: Path) -> None:
    async with (
        qemu_nbd(qemu, tmp_path, image, options=["--read-only"]) as server,
        mounted(server.uri, tmp_path / "mnt") as mount,
    ):
        [path] = await aside(list, (mount.path / "images").iterdir())
        assert await aside(errno_of, lambda: fallocate(path, PUNCH_HOLE, 0, 64 * KIB)) == "ENOTSUP"
        await aside(assert_same, path, image)


async def test_all_exports_of_a_server_or_one(qemu: Qemu, tmp_path: Path, image: Path) -> None:
    other = make_random(tmp_path / "other", MIB, seed=5)
    options = []
    for name, path in (("root", image), ("data", other)):
        options += ["--blockdev", f"file,node-name={name},filename={path}"]
        options += ["--export", f"nbd,id={name},node-name={name},name={name}"]
    async with storage_daemon(qemu, tmp_path, options) as server:
        async with mounted(server.uri, tmp_path / "mnt") as mount:
            assert set(await aside(os.listdir, mount.path / "images")) == {"root.raw", "data.raw"}
            await aside(assert_same, mount.image("root"), image)
            await aside(assert_same, mount.image("data"), other)
        async with mounted(server.export("data"), tmp_path / "mnt") as mount:
            assert await aside(os.listdir, mount.path / "images") == ["data.raw"]
        (await qfsbackup("mount", server.export("none"), tmp_path / "mnt")).refused(32, "none")


async def test_the_bitmap_of_an_export_is_the_map(qemu: Qemu, tmp_path: Path, image: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    await run_img(qemu, "convert", "-f", "raw", "-O", "qcow2", image, disk)
    await run_img(qemu, "bitmap", "--add", "-g", "65536", disk, "changes")
    await trio.run_process(["qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 64k", disk], capture_stdout=True)
    options = ["-B", "changes", "-r"]
    async with (
        qemu_nbd(qemu, tmp_path, disk, image_format="qcow2", options=options) as server,
        mounted(server.uri, tmp_path / "mnt", "bitmap=changes,vm=web1") as mount,
    ):
        [path] = await aside(list, (mount.path / "maps").glob("*.txt"))
        lines = [line.split() for line in (await aside(path.read_text)).splitlines()]
        assert [line for line in lines if line[3] == "dirty"] == [[str(MIB), "65536", "1", "dirty"]]
        assert (await mount.json("vm.json"))["vm"] == "web1"


async def test_tls_with_certificates(tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path / "pki")
    async with (
        nbdkit(tmp_path, ["data", "1", "size=1M"], certificates=certificates, tcp=True) as server,
        mounted(server.uri, tmp_path / "mnt") as mount,
    ):
        [path] = await aside(list, (mount.path / "images").iterdir())
        assert await aside(path.read_bytes) == b"\x01" + bytes(MIB - 1)


async def test_a_read_error_reaches_the_reader_and_nobody_else(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    server_options = ["--filter=error", "pattern", "4M", "error-pread=EIO", "error-pread-rate=1"]
    server_options += [f"error-file={broken}"]
    async with (
        nbdkit(tmp_path, server_options) as server,
        mounted(server.uri, tmp_path / "mnt", expected=(0, 2)) as mount,
    ):
        [path] = await aside(list, (mount.path / "images").iterdir())

        def read(offset: int) -> bytes:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                return os.pread(descriptor, 64 * KIB, offset)
            finally:
                os.close(descriptor)

        assert len(await aside(read, 0)) == 64 * KIB
        await aside(broken.touch)
        assert await aside(errno_of, lambda: read(3 * MIB)) == "EIO"
        await aside(broken.unlink)
        assert len(await aside(read, 2 * MIB)) == 64 * KIB


async def test_a_server_that_dies_gives_errors_at_once_and_the_mount_ends(tmp_path: Path) -> None:
    async with (
        nbdkit(tmp_path, ["pattern", "64M"]) as server,
        mounted(server.uri, tmp_path / "mnt", expected=(2,)) as mount,
    ):
        [path] = await aside(list, (mount.path / "images").iterdir())
        server.process.kill()
        with trio.fail_after(20):
            assert await aside(errno_of, path.read_bytes) in ("EIO", "ENOTCONN")
            assert (await mount.status())["state"] == "broken"
            (await qfsbackup("umount", mount.path)).refused(2, "broken")
