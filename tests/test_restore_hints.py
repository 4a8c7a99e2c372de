# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `qfsbackup restore` says to somebody who made a mistake: what it was, and what to do."""

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qfsbackup.errors import UserError
from qfsbackup.restore.restore import restore
from tests.harness.chunk_set import CHUNK, cut, describe

MISTAKES = {  # what is restored, to where: words of both lines
    "the folder above": (".", "disk.raw", ["holds the disks vda, vdb", "{top}/chunks/vda"]),
    "the folder of all disks": ("chunks", "disk.raw", ["holds the disks vda, vdb", "{top}/chunks/vda"]),
    "a part of a disk": ("chunks/vda/000", "disk.raw", ["only a part of a disk", "{top}/chunks/vda"]),
    "an image": ("disk.img", "disk.raw", ["cannot read", "Not a directory", "an image is whole already"]),
    "a folder that is not there": ("chunks/vdc", "disk.raw", ["No such file", "chunks/<disk>"]),
    "into a folder that is not there": ("chunks/vda", "missing/a.raw", ["no folder {top}/missing", "mkdir -p"]),
    "below a file": ("chunks/vda", "disk.img/a.raw", ["cannot write", "Not a directory"]),
    "to vmdk": ("chunks/vda", "disk.vmdk", ["no .vmdk", "qemu-img convert -f raw -O vmdk disk.raw disk.vmdk"]),
    "to VHDX": ("chunks/vda", "disk.VHDX", ["no .vhdx", "-O vhdx"]),
    "to a packed image": ("chunks/vda", "disk.raw.zst", ["no .zst", "disk.raw"]),
}


@pytest.fixture
def backup(chunks: Path, tmp_path: Path) -> Path:
    """Two disks, and an image."""
    cut(tmp_path / "chunks" / "vdb", bytes(CHUNK))
    (tmp_path / "disk.img").touch()
    return chunks


@pytest.mark.usefixtures("backup")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_explained(mistake: str, tmp_path: Path) -> None:
    folder, output, words = MISTAKES[mistake]
    with pytest.raises(UserError) as caught:
        restore(tmp_path / folder, tmp_path / output)
    said = f"{caught.value.what}\n{caught.value.hint}"
    assert [word for word in words if word.format(top=tmp_path) not in said] == [], said
    assert not (tmp_path / output).exists()


def test_who_insists_on_a_format_gets_it_under_any_name(chunks: Path, tmp_path: Path) -> None:
    restore(chunks, tmp_path / "disk.vmdk", "raw")
    assert (tmp_path / "disk.vmdk").read_bytes() == (tmp_path / "expected").read_bytes()
    restore(chunks, tmp_path / "disk.QCOW2")
    assert (tmp_path / "disk.QCOW2").read_bytes()[:4] == b"QFI\xfb"


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that everybody can get to."""
    with tempfile.TemporaryDirectory(prefix="qfsbackup-", dir="/dev/shm") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize(("closed", "hint"), [("chunks", "read all of it"), ("output", "may write to")])
def test_without_permission_it_says_whose_it_must_be(public: Path, closed: str, hint: str) -> None:
    chunks = cut(public / "chunks" / "vda", bytes(CHUNK))
    chunks.chmod(0o700 if closed == "chunks" else 0o755)
    words: list[str | Path] = [sys.executable, "-m", "qfsbackup", "restore", chunks, public / "disk.raw"]
    done = subprocess.run(words, user="nobody", group="nogroup", capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert os.strerror(errno.EACCES) in done.stderr
    assert hint in done.stderr.splitlines()[-1]


def test_a_full_store_says_that_room_is_missing(chunks: Path, tmp_path: Path) -> None:
    words: list[str | Path] = [sys.executable, "-m", "qfsbackup", "restore", chunks, tmp_path / "disk.raw"]
    done = subprocess.run(["sh", "-c", 'ulimit -f 1; exec "$@"', "sh", *words], capture_output=True, check=False)
    assert done.returncode == 2
    assert b"ulimit -f" in done.stderr
    assert not list(tmp_path.glob("*disk.raw*"))


def test_without_vm_json_it_says_how_to_get_it(chunks: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The last chunk may be missing as well: nothing else would tell."""
    (tmp_path / "vm.json").unlink()
    (chunks / "000" / "00000004").unlink()
    restore(chunks, tmp_path / "disk.raw")
    assert f"no {tmp_path}/vm.json" in caplog.text
    assert "Let the tool restore it too" in caplog.text
    describe(tmp_path, size=4 * CHUNK + 1536)
    with pytest.raises(UserError, match="holds 4 chunks"):
        restore(chunks, tmp_path / "other.raw")
