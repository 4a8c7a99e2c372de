# SPDX-License-Identifier: LGPL-2.1-or-later
"""`qfsbackup restore`: what comes out is the disk, and what is not a whole disk is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qfsbackup.backup.chunk_set import find_chunks
from qfsbackup.backup.names import chunk_path
from qfsbackup.errors import UserError
from qfsbackup.restore.restore import restore
from tests.harness.chunk_set import CHUNK, cut, describe, make_content
from tests.harness.files import allocated


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *words], check=True)


ends = st.integers(0, 12 * CHUNK)


@given(
    size=st.integers(1, 12 * CHUNK),
    data=st.lists(st.tuples(ends, ends), max_size=4),
    chunk=st.sampled_from([CHUNK, 4 * CHUNK, 4 << 20]),
)
@settings(deadline=None, max_examples=15)
def test_the_image_is_the_disk(
    tmp_path_factory: pytest.TempPathFactory, size: int, data: list[tuple[int, int]], chunk: int
) -> None:
    folder = tmp_path_factory.mktemp("restore")
    content = make_content(size, data)
    cut(folder / "chunks" / "vda", content, chunk)
    restore(folder / "chunks" / "vda", folder / "disk.raw")
    assert (folder / "disk.raw").read_bytes() == content
    restore(folder / "chunks" / "vda", folder / "disk.qcow2")
    qemu_img("check", "-q", folder / "disk.qcow2")
    qemu_img("compare", "-q", "-f", "raw", "-F", "qcow2", folder / "disk.raw", folder / "disk.qcow2")
    shutil.rmtree(folder)


def test_a_large_qcow2_has_several_tables(tmp_path: Path) -> None:
    """An L2 table reaches over 512 MiB; this disk has 1280, most of them zero."""
    folder, chunk = tmp_path / "chunks" / "vda", 16 << 20
    for number in range(80):
        path = folder / chunk_path(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(chunk)
            for offset in range(0, chunk, 1 << 20) if number in (0, 33, 79) else ():
                file.seek(offset)
                file.write(b"x%d" % (number + offset))
    restore(folder, tmp_path / "disk.raw")
    restore(folder, tmp_path / "disk.qcow2")
    assert allocated(tmp_path / "disk.raw") <= 60 * CHUNK
    assert (tmp_path / "disk.qcow2").stat().st_size <= 60 * CHUNK
    qemu_img("check", "-q", tmp_path / "disk.qcow2")
    qemu_img("compare", "-q", tmp_path / "disk.raw", tmp_path / "disk.qcow2")


def test_an_empty_disk_is_restored_where_vm_json_says_so(tmp_path: Path) -> None:
    folder = cut(tmp_path / "chunks" / "vda", b"")
    with pytest.raises(UserError, match="no chunks"):
        restore(folder, tmp_path / "out.raw")
    describe(tmp_path, size=0)
    restore(folder, tmp_path / "out.raw")
    assert (tmp_path / "out.raw").stat().st_size == 0
    restore(folder, tmp_path / "out.qcow2")
    qemu_img("check", "-q", tmp_path / "out.qcow2")


def test_zeros_become_holes(tmp_path: Path) -> None:
    folder = tmp_path / "chunks" / "vda"
    cut(folder, bytes(16 * CHUNK), 4 * CHUNK)
    for number in range(4):
        (folder / chunk_path(number)).write_bytes(bytes(4 * CHUNK))  # a tool that knows no holes
    restore(folder, tmp_path / "disk.raw")
    assert allocated(tmp_path / "disk.raw") == 0
    assert (tmp_path / "disk.raw").stat().st_size == 16 * CHUNK


def test_the_image_is_nobody_elses_to_read(chunks: Path, tmp_path: Path) -> None:
    restore(chunks, tmp_path / "disk.raw")
    assert (tmp_path / "disk.raw").stat().st_mode & 0o777 == 0o600


def remove_middle(chunks: Path) -> None:
    (chunks / chunk_path(2)).unlink()


def remove_first(chunks: Path) -> None:
    (chunks / chunk_path(0)).unlink()


def remove_last(chunks: Path) -> None:
    (chunks / chunk_path(4)).unlink()


def remove_all(chunks: Path) -> None:
    shutil.rmtree(chunks / "000")


def shorten_middle(chunks: Path) -> None:
    os.truncate(chunks / chunk_path(1), CHUNK - 512)


def lengthen_last(chunks: Path) -> None:
    os.truncate(chunks / chunk_path(4), CHUNK + 512)


def empty_last(chunks: Path) -> None:
    os.truncate(chunks / chunk_path(4), 0)


def last_of_another_time(chunks: Path) -> None:
    os.truncate(chunks / chunk_path(4), 2048)


def one_more(chunks: Path) -> None:
    os.truncate(chunks / chunk_path(4), CHUNK)
    (chunks / chunk_path(5)).write_bytes(b"x")


def strange_file(chunks: Path) -> None:
    (chunks / "000" / "00000001.partial").touch()


def strange_top(chunks: Path) -> None:
    (chunks / "README").touch()


def wrong_folder(chunks: Path) -> None:
    (chunks / "001").mkdir()
    (chunks / chunk_path(4)).rename(chunks / "001" / "00000004")


def link(chunks: Path) -> None:
    (chunks / chunk_path(4)).rename(chunks.parent / "elsewhere")
    (chunks / chunk_path(4)).symlink_to(chunks.parent / "elsewhere")


def other_chunk_size(chunks: Path) -> None:
    describe(chunks.parent.parent, size=4 * CHUNK + 1536, chunk=2 * CHUNK)


def other_disk(chunks: Path) -> None:
    describe(chunks.parent.parent, name="vdb", size=4 * CHUNK + 1536)


def broken_description(chunks: Path) -> None:
    (chunks.parent.parent / "vm.json").write_text('{"disks": [{}]}')


def description_of_nothing(chunks: Path) -> None:
    (chunks.parent.parent / "vm.json").write_text('{"disks": [{"name": "vda"}]}')


@pytest.mark.parametrize(
    "spoil",
    [
        remove_middle, remove_first, remove_last, remove_all, shorten_middle, lengthen_last, empty_last,
        last_of_another_time, one_more, strange_file, strange_top, wrong_folder, link, other_chunk_size, other_disk,
        broken_description, description_of_nothing,
    ],
)  # fmt: skip
def test_what_is_not_one_whole_set_is_refused(chunks: Path, tmp_path: Path, spoil: object) -> None:
    spoil(chunks)  # type: ignore[operator]  # one of the functions above
    with pytest.raises(UserError):
        restore(chunks, tmp_path / "disk.raw")
    assert not list(tmp_path.glob("*disk.raw*"))


@pytest.mark.parametrize("spoil", [remove_middle, remove_first, remove_all, shorten_middle, lengthen_last, empty_last])
def test_without_vm_json_the_set_itself_is_checked(chunks: Path, tmp_path: Path, spoil: object) -> None:
    (tmp_path / "vm.json").unlink()
    spoil(chunks)  # type: ignore[operator]  # one of the functions above
    with pytest.raises(UserError):
        restore(chunks, tmp_path / "disk.raw")


def test_without_vm_json_it_says_what_cannot_be_known(
    chunks: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "vm.json").unlink()
    restore(chunks, tmp_path / "disk.raw")
    assert (tmp_path / "disk.raw").read_bytes() == (tmp_path / "expected").read_bytes()
    assert "cannot be known" in caplog.text


def test_a_folder_of_several_disks_names_them(chunks: Path, tmp_path: Path) -> None:
    cut(tmp_path / "chunks" / "vdb", bytes(10))
    with pytest.raises(UserError, match="vda, vdb"):
        restore(chunks.parent, tmp_path / "disk.raw")
    with pytest.raises(UserError, match="cannot read"):
        restore(tmp_path / "nothing", tmp_path / "disk.raw")


def test_names_of_disks_may_be_anything(tmp_path: Path) -> None:
    folder = cut(tmp_path / "chunks" / "000", bytes(10))
    with pytest.raises(UserError, match="holds the disks 000"):
        restore(folder.parent, tmp_path / "disk.raw")
    describe(tmp_path, name="000", size=10)
    assert find_chunks(folder).described
