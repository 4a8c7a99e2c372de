# SPDX-License-Identifier: LGPL-2.1-or-later
"""A plain NBD server as the source: qemu-nbd, qemu-storage-daemon, nbdkit, mounted with the real command."""

import os
from pathlib import Path

import pytest
import trio

from tests.fuse.support import PUNCH_HOLE, errno_of, fallocate
from tests.harness.disk import MIB
from tests.harness.files import assert_same, make_random
from tests.harness.mount import Mount, aside, mounted, qfsbackup
from tests.harness.nbd_server import make_certificates, nbdkit, qemu_nbd, storage_daemon
from tests.harness.qemu import Qemu, run_img

pytestmark = pytest.mark.one_qemu
KIB = 1024


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_random(tmp_path / "image", 4 * MIB, hole_every=3)


async def test_an_export_is_mounted_and_punched_where_its_data_may_go(qemu: Qemu, tmp_path: Path, image: Path) -> None:
    expected = bytearray(await aside(image.read_bytes))
    async with (
        qemu_nbd(qemu, tmp_path, image, options=["--discard=unmap"]) as server,
        mounted(server.uri, tmp_path / "mnt", "trim-server-data") as mount,
    ):
        [path] = await aside(list, (mount.path / "images").iterdir())
        assert await aside(path.read_bytes) == expected
        await aside(fallocate, path, PUNCH_HOLE, 128 * KIB, 64 * KIB)
        expected[128 * KIB : 192 * KIB] = bytes(64 * KIB)
        assert await aside(path.read_bytes) == expected
    assert await aside(image.read_bytes) == expected  # the server's own file: here a punch is a discard


async def test_a_read_only_export_cannot_be_punched(qemu: Qemu, tmp_path: Path, image: Path) -> None:
    async with qemu_nbd(qemu, tmp_path, image, options=["--read-only"]) as server:
        async with mounted(server.uri, tmp_path / "mnt") as mount:
            [path] = await aside(list, (mount.path / "images").iterdir())
            assert await aside(errno_of, lambda: fallocate(path, PUNCH_HOLE, 0, 64 * KIB)) == "ENOTSUP"
            await aside(assert_same, path, image)
        trimming = ("-o", "trim-server-data")
        (await qfsbackup("mount", server.uri, tmp_path / "mnt", *trimming)).refused(1, "does not let")


@pytest.fixture
async def changed(qemu: Qemu, tmp_path: Path, image: Path) -> Path:
    """A qcow2 image of which a bitmap, `changes`, knows one cluster; the rest is what `image` holds."""
    disk = tmp_path / "disk.qcow2"
    await run_img(qemu, "convert", "-f", "raw", "-O", "qcow2", image, disk)
    await run_img(qemu, "bitmap", "--add", "-g", "65536", disk, "changes")
    await trio.run_process(["qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 64k", disk], capture_stdout=True)
    return disk


async def content(qemu: Qemu, disk: Path) -> bytes:
    """Every byte that the image holds."""
    raw = disk.with_suffix(".content")
    await run_img(qemu, "convert", "-f", "qcow2", "-O", "raw", disk, raw)
    return await aside(raw.read_bytes)


async def read_and_punch(mount: Mount) -> str:
    """Read each chunk that can be read, then punch the first megabyte of the image, if there is one; its errno."""
    for chunk in await aside(sorted, (mount.path / "chunks").glob("*/*/*")):
        assert await aside(errno_of, chunk.read_bytes) in ("", "EIO")
    [disk] = await aside(list, (mount.path / "delta").iterdir())
    return await aside(errno_of, lambda: fallocate(disk, PUNCH_HOLE, MIB, 64 * KIB))


@pytest.mark.parametrize("options", ["access=dirty", "access=dirty,bitmap=changes", "bitmap=changes"])
async def test_what_a_server_holds_is_the_same_after_a_mount(
    qemu: Qemu, tmp_path: Path, changed: Path, options: str
) -> None:
    before = await content(qemu, changed)
    async with qemu_nbd(
        qemu, tmp_path, changed, image_format="qcow2", options=["-B", "changes", "--discard=unmap"]
    ) as server:
        async with mounted(server.uri, tmp_path / "mnt", f"{options},chunk=64k") as mount:
            assert await read_and_punch(mount) == "ENOTSUP"
        release = f"{options},discard=release"
        done = await qfsbackup("mount", server.uri, tmp_path / "mnt", "-o", release)
        done.refused(1, "would trim the server's own data")
    assert await content(qemu, changed) == before


@pytest.mark.parametrize("options", ["access=dirty", "discard=release", "access=full"])
async def test_what_may_go_is_trimmed_on_the_server(qemu: Qemu, tmp_path: Path, changed: Path, options: str) -> None:
    before = await content(qemu, changed)
    trimming = f"{options},bitmap=changes,chunk=64k,trim-server-data"
    async with (
        qemu_nbd(qemu, tmp_path, changed, image_format="qcow2", options=["-B", "changes", "--discard=unmap"]) as server,
        mounted(server.uri, tmp_path / "mnt", trimming) as mount,
    ):
        assert await read_and_punch(mount) == ""
    kept = await content(qemu, changed)
    assert kept[MIB : MIB + 64 * KIB] == bytes(64 * KIB)
    if options == "access=full":
        assert kept[:MIB] + kept[MIB + 64 * KIB :] == before[:MIB] + before[MIB + 64 * KIB :]
    else:
        assert kept == bytes(len(before))


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


async def test_the_bitmap_of_an_export_is_the_map(qemu: Qemu, tmp_path: Path, changed: Path) -> None:
    options = ["-B", "changes", "-r"]
    async with (
        qemu_nbd(qemu, tmp_path, changed, image_format="qcow2", options=options) as server,
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
