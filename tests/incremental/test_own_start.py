# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tools that compare with the start of their own last run miss nothing, however soon the next one is.

GNU tar --listed-incremental and find -newer take what is not newer than that start for unchanged.
"""

import contextlib
import os
import shlex
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qfsbackup.restore.restore import restore
from tests.harness.files import assert_same
from tests.harness.mount import Mount, aside, command, mounted
from tests.harness.qemu import Qemu
from tests.incremental.support import CHUNK, Bed, bed, chunk_names
from tests.vm.support import guest_io

pytestmark = pytest.mark.one_qemu


@dataclass
class Copy:
    """A folder that a tool keeps equal to what it reads. `script` is run in the mount, `after` it in the copy."""

    folder: Path
    script: str
    after: str

    def line(self) -> str:
        """The shell command of one run."""
        folder = shlex.quote(str(self.folder))
        return f"set -e; here=$PWD; F={folder}; mkdir -p $F/copy; {self.script}; cd $F/copy; {self.after}; cd $here"


TAR = ("tar -g $F/state -cf $F/new.tar chunks vm.json", "tar -g /dev/null -xf $F/new.tar")
FIND = (
    "touch $F/stamp.new; test -e $F/stamp || touch -d @0 $F/stamp;"
    "find chunks vm.json -type f -newer $F/stamp > $F/list; cpio -pdum --quiet $F/copy < $F/list",
    "mv $F/stamp.new $F/stamp",
)


@contextlib.asynccontextmanager
async def ended_somehow(lab: Bed, end: str) -> AsyncIterator[Mount]:
    """A mount that ends in order, uncommitted, or whose worker is killed: the supervisor then cleans up."""
    killed = end == "killed"
    expected = (0, 128 + signal.SIGKILL) if killed else (0,)
    async with mounted(lab.qmp, lab.mountpoint, lab.options("nas"), expected=expected) as mount:
        yield mount
        if end == "committed":
            await aside((mount.path / ".qfsbackup/control").write_text, "commit\n")
        if killed:
            os.kill(await mount.worker(), signal.SIGKILL)
            await mount.process.wait()


async def read(copy: Copy, mount: Mount) -> None:
    """One run of the tool."""
    done = await command("/bin/bash", "-c", copy.line(), cwd=mount.path)
    assert done.code == 0, done


@pytest.mark.parametrize(("tool", "end"), [(TAR, "committed"), (TAR, "killed"), (FIND, "rolled back")])
async def test_what_changed_soon_after_the_last_run_is_read(
    qemu: Qemu, tmp_path: Path, tool: tuple[str, str], end: str, caplog: pytest.LogCaptureFixture
) -> None:
    copy = Copy(tmp_path / "backup", *tool)
    async with bed(qemu, tmp_path) as lab:
        async with ended_somehow(lab, end) as mount:
            await read(copy, mount)
        await guest_io(lab.vm, "vda", f"write -P 1 {3 * CHUNK} 64k")
        await guest_io(lab.vm, "vdb", "write -P 2 100k 1k")
        async with ended_somehow(lab, "rolled back") as mount:
            await read(copy, mount)
        for disk in ("vda", "vdb"):
            image, now = tmp_path / f"{disk}.restored", await lab.disk(disk, tmp_path / f"{disk}.now")
            await aside(restore, copy.folder / "copy/chunks" / disk, image)
            await aside(assert_same, image, now)
        assert "cannot be known" not in caplog.text


async def test_what_did_not_change_is_still_not_read(qemu: Qemu, tmp_path: Path) -> None:
    """The test above would also hold if everything always were newer."""
    copy = Copy(tmp_path / "backup", *FIND)
    async with bed(qemu, tmp_path) as lab:
        for number in range(3):
            async with ended_somehow(lab, "committed") as mount:
                await read(copy, mount)
            await guest_io(lab.vm, "vda", f"write -P 1 {number * CHUNK} 64k")
        listed = set((copy.folder / "list").read_text().split())
        # What has a time less than a second ahead may be read once more.
        assert {*chunk_names("vda", [1]), "vm.json"} <= listed <= {*chunk_names("vda", [0, 1]), "vm.json"}
