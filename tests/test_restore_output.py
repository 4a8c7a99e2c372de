# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where `qfsbackup restore` writes: files, block devices, and a terminal that shows how far it is."""

from __future__ import annotations

import errno
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from qfsbackup.errors import UserError
from qfsbackup.restore.restore import restore
from tests.harness.chunk_set import CHUNK
from tests.harness.files import loop_device


def test_nothing_is_overwritten_without_force(chunks: Path, tmp_path: Path) -> None:
    output = tmp_path / "disk.raw"
    output.write_bytes(b"old")
    with pytest.raises(UserError, match="is there already"):
        restore(chunks, output)
    assert output.read_bytes() == b"old"
    restore(chunks, output, force=True)
    assert output.read_bytes() == (tmp_path / "expected").read_bytes()


def test_a_failure_half_way_leaves_what_was_there(chunks: Path, tmp_path: Path) -> None:
    """The file system is full: a tmpfs of its own."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", place], check=True)
    try:
        with pytest.raises(UserError, match=os.strerror(errno.ENOSPC)):
            restore(chunks, place / "disk.raw")
        assert list(place.iterdir()) == []
    finally:
        subprocess.run(["umount", place], check=True)


def test_neither_folder_nor_pipe_is_written_to(chunks: Path, tmp_path: Path) -> None:
    for output in (tmp_path, Path("/dev/null"), tmp_path / "missing" / "disk.raw"):
        with pytest.raises(UserError):
            restore(chunks, output, force=True)


def test_a_block_device_gets_the_zeros_too_and_must_be_large_enough(chunks: Path, tmp_path: Path) -> None:
    expected = (tmp_path / "expected").read_bytes()
    with loop_device(tmp_path / "large", 6 * CHUNK) as device:
        with pytest.raises(UserError, match="is there already"):
            restore(chunks, device)
        with pytest.raises(UserError, match="raw image"):
            restore(chunks, device, "qcow2", force=True)
        restore(chunks, device, force=True)
    assert (tmp_path / "large").read_bytes() == expected + b"\xaa" * (6 * CHUNK - len(expected))
    with loop_device(tmp_path / "small", 4 * CHUNK) as device, pytest.raises(UserError, match="bytes, the disk"):
        restore(chunks, device, force=True)
    assert set((tmp_path / "small").read_bytes()) == {0xAA}


def test_the_format_can_be_named(chunks: Path, tmp_path: Path) -> None:
    restore(chunks, tmp_path / "disk.img", "qcow2")
    restore(chunks, tmp_path / "disk.qcow2", "raw")
    assert (tmp_path / "disk.img").read_bytes()[:4] == b"QFI\xfb"
    assert (tmp_path / "disk.qcow2").read_bytes() == (tmp_path / "expected").read_bytes()


def test_a_terminal_shows_a_bar(chunks: Path, tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\nfrom qfsbackup.restore.restore import restore\nrestore(*map(pathlib.Path, sys.argv[1:]))"
    )
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm"}
    words: list[str | Path] = [sys.executable, "-c", program, chunks, tmp_path / "disk.raw"]
    with subprocess.Popen(words, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 1000)
            except OSError:  # EIO: the other end is closed
                break
    os.close(ours)
    assert process.returncode == 0
    assert b"restored" in shown
    assert b"100%" in shown
