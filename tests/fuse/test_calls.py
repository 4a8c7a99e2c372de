# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the kernel is answered: lseek and fallocate, which pyfuse3 does not know, and everything that would change the
tree."""

import errno
import mmap
import os
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import pytest

from tests.fuse.serve import HOLE, INSTANT, KIB, MIB, SIZE, content
from tests.fuse.support import PUNCH_HOLE, errno_of, fallocate, memory_mount, opened
from tests.harness.files import data_extents
from tests.harness.mount import Mount, aside, command

CHANGES: dict[str, Callable[[Path], object]] = {
    "truncate": lambda top: os.truncate(top / "images/even.raw", 5),
    "O_TRUNC": lambda top: os.open(top / "images/even.raw", os.O_WRONLY | os.O_TRUNC),
    "create": lambda top: os.open(top / "images/new", os.O_WRONLY | os.O_CREAT),
    "exclusive create": lambda top: os.open(top / "new", os.O_RDWR | os.O_CREAT | os.O_EXCL),
    "write to vm.json": lambda top: os.open(top / "vm.json", os.O_WRONLY),
    "chmod": lambda top: (top / "vm.json").chmod(0o600),
    "chown": lambda top: os.chown(top / "vm.json", 1, 1),
    "utime": lambda top: os.utime(top / "images/even.raw"),
    "unlink": lambda top: (top / "vm.json").unlink(),
    "rename": lambda top: (top / "vm.json").rename(top / "other"),
    "mkdir": lambda top: (top / "new").mkdir(),
    "rmdir": lambda top: (top / "images").rmdir(),
    "symlink": lambda top: (top / "new").symlink_to("vm.json"),
    "link": lambda top: (top / "new").hardlink_to(top / "vm.json"),
    "mknod": lambda top: os.mkfifo(top / "new"),
    "setxattr": lambda top: os.setxattr(top / "vm.json", "user.key", b"value"),
    "removexattr": lambda top: os.removexattr(top / "vm.json", "user.key"),
}


@pytest.fixture
async def mount(tmp_path: Path) -> AsyncIterator[Mount]:
    async with memory_mount(tmp_path / "mnt") as mount:
        yield mount


def write_once(path: Path) -> None:
    with opened(path, os.O_WRONLY) as descriptor:
        os.write(descriptor, b"x")


async def test_whatever_would_change_the_tree_is_refused_and_changes_nothing(mount: Mount) -> None:
    def check() -> None:
        before = sorted((path, path.lstat()) for path in mount.path.rglob("*"))
        answers = {name: errno_of(partial(change, mount.path)) for name, change in CHANGES.items()}
        answers["write"] = errno_of(partial(write_once, mount.image("even")))
        assert answers == dict.fromkeys(answers, "EROFS")
        assert sorted((path, path.lstat()) for path in mount.path.rglob("*")) == before

    await aside(check)


async def test_no_file_has_extended_attributes(mount: Mount) -> None:
    def check() -> None:
        for path in (mount.path, mount.path / "vm.json", mount.image("even")):
            assert os.listxattr(path) == []

    await aside(check)
    copied = await command("cp", "--preserve=all", mount.path / "vm.json", mount.path.parent / "copy")
    assert (copied.code, copied.stderr) == (0, "")


async def test_the_mount_is_as_large_as_its_disks_and_full(mount: Mount) -> None:
    def check() -> None:
        size = sum(image.stat().st_size for image in (mount.path / "images").iterdir())
        found = os.statvfs(mount.path)
        assert 0 <= found.f_blocks * found.f_frsize - size < found.f_frsize
        assert (found.f_bfree, found.f_bavail) == (0, 0)

    await aside(check)
    shown = await command("df", "--output=target,pcent", mount.path)
    assert shown.stdout.split()[-2:] == [str(mount.path), "100%"]


async def test_data_and_holes_are_found_from_every_place(mount: Mount) -> None:
    def seek(descriptor: int, offset: int, whence: int) -> int | str:
        try:
            return os.lseek(descriptor, offset, whence)
        except OSError as error:
            return errno.errorcode[error.errno or 0]

    def check() -> None:
        assert data_extents(mount.image("plain")) == [(0, HOLE[0]), (HOLE[1], SIZE - HOLE[1])]
        with opened(mount.image("plain"), os.O_RDONLY) as descriptor:
            places = [0, HOLE[0] - 1, HOLE[0], HOLE[1] - 1, HOLE[1], SIZE - 1, SIZE, SIZE + 1]
            data = [seek(descriptor, place, os.SEEK_DATA) for place in places]
            hole = [seek(descriptor, place, os.SEEK_HOLE) for place in places]
        assert data == [0, HOLE[0] - 1, HOLE[1], HOLE[1], HOLE[1], SIZE - 1, "ENXIO", "ENXIO"]
        assert hole == [HOLE[0], HOLE[0], HOLE[0], HOLE[1] - 1, SIZE, SIZE, "ENXIO", "ENXIO"]
        assert data_extents(mount.path / "vm.json") == [(0, 3)]

    await aside(check)


async def test_a_punch_reaches_the_disk_and_reads_as_zeros_from_then_on(mount: Mount) -> None:
    path, start, length = mount.image("even"), 64 * KIB + 5, 192 * KIB
    await aside(fallocate, path, PUNCH_HOLE, start, length)

    def check() -> None:
        expected = bytearray(content(MIB))
        expected[start : start + length] = bytes(length)
        assert path.read_bytes() == expected
        assert data_extents(path) == [(0, start), (start + length, MIB - start - length)]
        assert path.stat().st_blocks * 512 < MIB
        assert path.stat().st_size == MIB

    await aside(check)
    status = await mount.status()
    assert status["disks"]["even"]["punched"] == length
    assert status["trims"]["even"] == [[start, start + length]]


async def test_a_punch_beyond_the_end_and_of_all_is_harmless(mount: Mount) -> None:
    path = mount.image("plain")
    await aside(fallocate, path, PUNCH_HOLE, SIZE + 5, MIB)
    assert (await mount.status())["trims"]["plain"] == []
    await aside(fallocate, path, PUNCH_HOLE, 0, 1 << 40)

    def check() -> None:
        assert path.read_bytes() == bytes(SIZE)
        assert data_extents(path) == []
        assert (path.stat().st_size, path.stat().st_blocks) == (SIZE, 1)  # 0 makes tar -S drop the whole file

    await aside(check)


async def test_every_other_fallocate_and_what_cannot_be_punched_is_unsupported(mount: Mount) -> None:
    def check() -> None:
        keep, punch, collapse, zero, insert, unshare = 0x01, 0x02, 0x08, 0x10, 0x20, 0x40
        for mode in (0, keep, punch, collapse, zero, zero | keep, insert, unshare, unshare | keep):
            answer = errno_of(partial(fallocate, mount.image("even"), mode, 0, 64 * KIB))
            assert answer == "ENOTSUP", f"mode {mode:#x}"  # the same number as EOPNOTSUPP
        assert mount.image("even").read_bytes() == content(MIB)
        assert errno_of(partial(fallocate, mount.image("fixed"), PUNCH_HOLE, 0, 64 * KIB)) == "ENOTSUP"
        assert errno_of(partial(write_once, mount.image("fixed"))) == "EROFS"
        assert mount.image("fixed").stat().st_mode & 0o777 == 0o400

    await aside(check)


async def test_a_defect_is_an_error_for_its_reader_alone(mount: Mount) -> None:
    def check() -> None:
        for _ in range(2):
            assert errno_of(mount.image("defect").read_bytes) == "EIO"
            assert errno_of(partial(fallocate, mount.image("defect"), PUNCH_HOLE, 0, 64 * KIB)) == "EIO"
        assert mount.image("even").read_bytes() == content(MIB)

    await aside(check)
    assert mount.process.log.count("ZeroDivisionError: a defect") >= 4  # its traceback is kept for the maintainer


async def test_a_private_mapping_reads_right(mount: Mount) -> None:
    def check() -> None:
        with (
            mount.image("plain").open("rb") as file,
            mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapping,
        ):
            assert mapping[SIZE - 5000 :] == content(SIZE)[SIZE - 5000 :]
            assert mapping[HOLE[0] : HOLE[1]] == bytes(HOLE[1] - HOLE[0])
            assert mapping[:4096] == content(SIZE)[:4096]

    await aside(check)


async def test_all_times_are_the_instant(mount: Mount) -> None:
    def check() -> None:
        for path in (mount.path, *mount.path.rglob("*"), mount.path / ".qfsbackup/status.json"):
            status = path.stat()
            assert {status.st_mtime_ns, status.st_ctime_ns, status.st_atime_ns} == {INSTANT}, path

    await aside(check)
