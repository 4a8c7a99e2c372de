# SPDX-License-Identifier: LGPL-2.1-or-later
"""`chunks:FOLDER`: a backup's disks byte for byte; what is not a whole backup is refused in the words of `restore`."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from qfsbackup.backup.names import chunk_path, file_name
from qfsbackup.contracts import awaited
from qfsbackup.errors import UserError
from qfsbackup.restore.restore import restore
from qfsbackup.sources import find
from tests.harness.chunk_set import CHUNK, cut, describe, make_content
from tests.harness.mount import PROGRAM, command, qfsbackup
from tests.sources.support import content_of, snapshot_of
from tests.test_restore_torn import MTIME, TIMES, set_time


@pytest.mark.parametrize(
    ("size", "data", "chunk"),
    [
        (4 * CHUNK + 1536, [(10, 5000), (2 * CHUNK, 4 * CHUNK + 1536)], CHUNK),  # the last one is short
        (300 * CHUNK, [(0, CHUNK), (254 * CHUNK, 258 * CHUNK)], CHUNK),  # in two folders
        (5000, [(0, 5000)], CHUNK),  # just one
        (6 << 20, [(1 << 20, (1 << 20) + 9), (3 << 20, 5 << 20)], 4 << 20),  # holes inside of a chunk
        (8 * CHUNK, [], CHUNK),  # nothing but holes
        (0, [], CHUNK),
    ],
)
async def test_it_is_the_disk_and_its_holes_are_known(
    tmp_path: Path, size: int, data: list[tuple[int, int]], chunk: int
) -> None:
    content = make_content(size, data)
    cut(tmp_path / "chunks" / "vda", content, chunk)
    describe(tmp_path, size=size, chunk=chunk)
    for path in (tmp_path / "chunks" / "vda").glob("*/*"):
        piece = path.read_bytes()
        if chunk > CHUNK:  # the harness knows whole chunks as holes only
            path.write_bytes(b"")
            with path.open("wb") as file:
                for offset in range(0, len(piece), CHUNK):
                    if any(block := piece[offset : offset + CHUNK]):
                        file.seek(offset)
                        file.write(block)
                file.truncate(len(piece))
    async with snapshot_of(tmp_path) as (_, disks, _status):
        assert await content_of(disks["vda"]) == content
        expected = {block for block in range(-(-size // CHUNK)) if any(content[block * CHUNK :][:CHUNK])}
        known = {block for start, end in disks["vda"].data for block in range(start // CHUNK, -(-end // CHUNK))}
        assert known == expected
        await disks["vda"].probe()


async def test_a_file_that_says_it_is_full_is_data_without_being_opened(tmp_path: Path) -> None:
    """As below `restic mount`, where opening costs most."""
    folder = cut(tmp_path / "chunks" / "vda", bytes(2 * CHUNK))
    (folder / chunk_path(1)).write_bytes(bytes(CHUNK))
    async with snapshot_of(tmp_path) as (_, disks, _status):
        assert list(disks["vda"].data) == [(CHUNK, 2 * CHUNK)]


async def test_reads_of_several_at_once_and_of_more_files_than_stay_open(tmp_path: Path) -> None:
    content = make_content(400 * CHUNK, [(0, 400 * CHUNK)])
    cut(tmp_path / "chunks" / "vda", content)
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    async with snapshot_of(tmp_path) as (_, disks, _status):
        disk = disks["vda"]

        async def read(first: int) -> None:
            for start in range(first * 1000, disk.size - 4096, 7 * CHUNK):
                assert await awaited(disk.read, start, 4096) == content[start : start + 4096]

        async with trio.open_nursery() as readers:
            for first in range(40):
                readers.start_soon(read, first)
        assert len(os.listdir("/proc/self/fd")) < descriptors + 300  # noqa: PTH208
    assert len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208


# ---- which backup, which disks ----


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A backup of two disks, one of a strange name, with what it takes to be whole."""
    folder = tmp_path / "restored"
    disks = []
    for name, size in (("vda", 3 * CHUNK), ("odd name/1", CHUNK + 5)):
        cut(folder / "chunks" / file_name(name), make_content(size, [(0, size)]))
        disks.append({"name": name, "size": size, "chunk_size": CHUNK})
    facts = {"vm": "web1", "uuid": "u-1", "instant": "2026-01-02T03:04:05.000006Z", "frozen": True, "disks": disks}
    (folder / "vm.json").write_text(json.dumps(facts))
    (folder / "config").mkdir()
    (folder / "config" / "qemu.json").write_bytes(b"{}")
    return folder


@pytest.mark.parametrize(
    ("below", "names"),
    [
        (".", ["vda", "odd name/1"]),
        ("chunks", ["vda", "odd name/1"]),
        ("chunks/vda", ["vda"]),
        ("chunks/odd%20name%2F1", ["odd name/1"]),
    ],
)
async def test_the_backup_its_chunks_or_one_disk_may_be_named(two: Path, below: str, names: list[str]) -> None:
    async with snapshot_of(two / below) as (snapshot, disks, _):
        assert list(disks) == names
        assert (snapshot.vm, snapshot.uuid, snapshot.frozen, snapshot.own) == ("web1", "u-1", True, False)
        assert snapshot.instant == 1767323045_000006000
        assert snapshot.config == {"qemu.json": b"{}", "vm.json": (two / "vm.json").read_bytes()}


async def test_disks_are_chosen_by_their_names(two: Path) -> None:
    async with snapshot_of(two, disks=("odd name/1",)) as (_, disks, _status):
        assert list(disks) == ["odd name/1"]
    shutil.rmtree(two / "chunks" / "vda")
    with pytest.raises(UserError, match="chunks/vda is missing") as caught:
        async with snapshot_of(two):
            pass
    assert "exclude=" in caught.value.hint
    async with snapshot_of(two, exclude=("vda",)) as (_, disks, _status):
        assert list(disks) == ["odd name/1"]
    with pytest.raises(UserError, match="no disk vdz"):
        async with snapshot_of(two, disks=("vdz",)):
            pass


async def test_without_vm_json_the_newest_chunk_is_the_instant(two: Path) -> None:
    (two / "vm.json").unlink()
    os.utime(two / "chunks" / "vda" / chunk_path(1), ns=(0, 2**61))
    async with snapshot_of(two) as (snapshot, disks, _):
        assert (snapshot.vm, snapshot.instant) == ("restored", 2**61)
        assert set(disks) == {"vda", "odd name/1"}


async def test_a_link_is_followed_once(two: Path, tmp_path: Path) -> None:
    """`latest` of restic's mount leads to another backup tomorrow."""
    link = tmp_path / "latest"
    link.symlink_to(two)
    async with snapshot_of(link) as (_, disks, status):
        link.unlink()
        link.symlink_to(tmp_path / "nothing")
        assert await content_of(disks["vda"]) == make_content(3 * CHUNK, [(0, 3 * CHUNK)])
        assert not status.health.broken


# ---- what is refused ----


def torn(chunks: Path) -> None:
    set_time(chunks, 2, 0)


def incomplete(chunks: Path) -> None:
    (chunks / chunk_path(2)).unlink()


def too_short(chunks: Path) -> None:
    (chunks / chunk_path(4)).unlink()


def strange(chunks: Path) -> None:
    (chunks / "README").touch()


def of_another_disk(chunks: Path) -> None:
    describe(chunks.parent.parent, name="vdb", size=4 * CHUNK + 1536)


def cut_at_the_end(chunks: Path) -> None:
    """Without vm.json the partition table tells."""
    (chunks.parent.parent / "vm.json").unlink()
    with (chunks / chunk_path(0)).open("r+b") as file:
        file.seek(446)
        partition = b"\0\0\0\0\x83\0\0\0" + (2048).to_bytes(4, "little") + (1 << 20).to_bytes(4, "little")
        file.write(partition.ljust(64, b"\0") + b"\x55\xaa")


@pytest.mark.parametrize("spoil", [torn, incomplete, too_short, strange, of_another_disk, cut_at_the_end])
async def test_what_restore_refuses_is_refused_in_its_words(
    chunks: Path, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    for number, time in enumerate(TIMES):
        set_time(chunks, number, time)
    describe(tmp_path, size=4 * CHUNK + 1536, times=TIMES, mtime=MTIME)
    async with snapshot_of(chunks):
        pass  # until it is spoilt
    spoil(chunks)
    with pytest.raises(UserError) as restores:
        restore(chunks, tmp_path / "disk.raw")
    with pytest.raises(UserError) as ours:
        async with snapshot_of(chunks):
            pass
    assert (ours.value.what, ours.value.hint) == (restores.value.what, restores.value.hint)


@pytest.mark.parametrize(
    "options",
    ["target=nas", "agent=/run/a", "freeze=require", "bitmap=b", "trim-server-data", "discard=release", "bwlimit=1M"],
)
async def test_an_option_of_a_vm_or_a_server_is_refused(chunks: Path, directory: Path, options: str) -> None:
    done = await qfsbackup("mount", f"chunks:{chunks}", directory, "-o", options)
    done.refused(1)
    assert options.partition("=")[0] in done.stderr


async def test_run_and_the_mount_helper_take_it_too(chunks: Path, tmp_path: Path, directory: Path) -> None:
    line: list[str | Path] = ["--mountpoint", directory, "--", "cmp", "images/vda.raw", tmp_path / "expected"]
    done = await qfsbackup("run", f"chunks:{chunks}", *line)
    assert done.code == 0, done
    helper = PROGRAM.with_name("mount.qfsbackup")
    assert (await command(helper, f"chunks:{chunks}", directory, "-o", "ro,noauto")).code == 0
    try:
        assert f"chunks:{chunks} {directory} fuse.qfsbackup ro" in (await command("cat", "/proc/mounts")).stdout
    finally:
        assert (await qfsbackup("umount", directory)).code == 0
    (await command(helper, "chunks:/nonexistent", directory)).refused(32, "/nonexistent")
    assert (await command(helper, "chunks:/nonexistent", directory, "-o", "nofail")).code == 0


async def test_what_is_no_backup_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError) as caught:
            async with snapshot_of(folder):
                pass
        assert str(folder) in caught.value.what
        assert caught.value.exit_code == 32  # with nofail it is no error
    with pytest.raises(UserError, match="no folder behind it"):
        find("chunks:")
