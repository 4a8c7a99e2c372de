# SPDX-License-Identifier: LGPL-2.1-or-later
"""Without vm.json, `qfsbackup restore` knows by a disk's partition table that its end is missing."""

import struct
import subprocess
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qfsbackup.backup.names import chunk_path
from qfsbackup.backup.partitions import HEAD, least_size
from qfsbackup.errors import UserError
from qfsbackup.restore.restore import restore
from tests.harness.chunk_set import cut
from tests.harness.disk import MIB

SIZE = 8 * MIB


def mbr(*partitions: tuple[int, int, int]) -> bytes:
    """A boot sector with partitions: type, first sector, sectors."""
    entries = b"".join(struct.pack("<B3xB3xII", 0x80, *partition) for partition in partitions)
    return bytes(446) + entries.ljust(64, b"\0") + b"\x55\xaa"


def gpt(size: int, sector: int) -> bytes:
    """The beginning of a disk with a GPT."""
    last = size // sector - 1
    fields = (b"EFI PART", 0x10000, 92, 0, 0, 1, last, 34, last - 33, bytes(16), 2, 128, 128, 0)
    header = struct.pack("<8sIIIIQQQQ16sQIII", *fields)
    header = header[:16] + struct.pack("<I", zlib.crc32(header)) + header[20:]
    return mbr((0xEE, 1, min(last, 0xFFFFFFFF))).ljust(sector, b"\0") + header


HEADS = {
    "GPT": gpt(SIZE, 512),
    "GPT, 4 KiB sectors": gpt(SIZE, 4096),
    "MBR": mbr((0x83, 2048, 4096), (0x82, 6144, SIZE // 512 - 6144)),
}


def without_its_last_chunk(folder: Path, head: bytes) -> Path:
    """A disk of `SIZE` bytes that begins so."""
    chunks = cut(folder / "chunks" / "vda", head.ljust(SIZE, b"\0"), MIB)
    (chunks / chunk_path(SIZE // MIB - 1)).rename(folder / "last")
    return chunks


@pytest.mark.parametrize("kind", HEADS)
def test_an_end_that_is_missing_is_known_by_the_partition_table(kind: str, tmp_path: Path) -> None:
    chunks = without_its_last_chunk(tmp_path, HEADS[kind])
    with pytest.raises(UserError, match=f"missing at the end: .* {SIZE} bytes at least, these are {SIZE - MIB}"):
        restore(chunks, tmp_path / "disk.raw")
    restore(chunks, tmp_path / "torn.raw", torn=True)
    assert (tmp_path / "torn.raw").stat().st_size == SIZE - MIB
    (tmp_path / "last").rename(chunks / chunk_path(SIZE // MIB - 1))
    restore(chunks, tmp_path / "disk.raw")
    assert (tmp_path / "disk.raw").read_bytes() == HEADS[kind].ljust(SIZE, b"\0")


@pytest.mark.parametrize("head", [bytes(512), b"\xff" * 510 + b"\x55\xaa", mbr(), mbr((0x83, 0, 99)), b"", b"\x55\xaa"])
def test_what_is_no_partition_table_says_nothing(head: bytes) -> None:
    assert least_size(head) == 0


@given(st.binary(max_size=HEAD))
def test_any_bytes_are_read(head: bytes) -> None:
    assert least_size(head) >= 0


@pytest.mark.parametrize("maker", ["mkfs.ext4", "mkswap"])
def test_a_file_system_without_partitions_says_nothing(maker: str, tmp_path: Path) -> None:
    with (tmp_path / "image").open("wb") as file:
        file.truncate(SIZE)
    subprocess.run([maker, "-q", tmp_path / "image"], check=True)
    with (tmp_path / "image").open("rb") as file:
        assert least_size(file.read(HEAD)) == 0
