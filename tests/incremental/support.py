# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tests of incremental backups share: a VM with two small disks, its targets, and what a `run` left."""

import contextlib
import json
import re
import shlex
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from qfsbackup.vm.quirks import request_unit
from tests.harness.disk import MIB, Disk
from tests.harness.files import make_random
from tests.harness.mount import Mount, Result, aside, mounted, qfsbackup, taken_away
from tests.harness.qemu import Qemu, run_img
from tests.harness.vm import Vm, running_vm
from tests.incremental.tools import Tool

CHUNK = 64 * 1024
SIZE = 2 * MIB
CHUNKS = SIZE // CHUNK
DISKS = ("vda", "vdb")


@dataclass
class Bed:
    """A VM, the folder of a test, and what its backups leave there. `qmp` is what the product connects to."""

    vm: Vm
    folder: Path
    qmp: Path = field(init=False)

    def __post_init__(self) -> None:
        self.qmp = self.vm.qmp
        (self.folder / "state").mkdir(mode=0o700, exist_ok=True)

    @property
    def mountpoint(self) -> Path:
        """Where all mounts of the test are."""
        return self.folder / "mnt"

    def options(self, target: str, *more: str) -> str:
        """What stands behind -o."""
        chunk = [] if any(option.startswith("chunk=") for option in more) else [f"chunk={CHUNK}"]
        return ",".join([f"target={target}", f"state={self.folder / 'state'}", *chunk, *more])

    def mounted(self, target: str, *more: str) -> AbstractAsyncContextManager[Mount]:
        """The VM mounted for a target, for the length of the block."""
        return mounted(self.qmp, self.mountpoint, self.options(target, *more))

    async def commit(self) -> None:
        """Commit what is mounted."""
        assert await qfsbackup("commit", self.mountpoint) == Result(0, "", "")

    async def committed(self, target: str, *more: str) -> dict[str, Any]:
        """Mount and commit without any tool; vm.json."""
        async with self.mounted(target, *more) as mount:
            await self.commit()
            description: dict[str, Any] = await mount.json("vm.json")
        return description

    async def run(self, target: str, script: str, *more: str, code: int = 0) -> Result:
        """`qfsbackup run` with a script, which must end with this exit status."""
        self.mountpoint.mkdir(exist_ok=True)
        place = ["-o", self.options(target, *more), "--mountpoint", str(self.mountpoint)]
        done = await qfsbackup("run", self.qmp, *place, "--", "/bin/sh", "-c", script)
        assert done.code == code, done
        return done

    async def backup(self, tool: Tool, *more: str, ending: str = "", code: int = 0) -> "Round":
        """Back up with a tool to the target of its name. `ending` is run behind the tool."""
        result = Round(tool, self.folder / f"{tool.name}.round", self.vm.qemu)
        await self.run(tool.name, result.script(tool.command(), ending), *more, code=code)
        return result

    async def checkpoints(self, *more: str) -> list[str]:
        """The lines of `qfsbackup checkpoints`."""
        done = await qfsbackup("checkpoints", self.qmp, "-o", self.options("nas"), *more)
        assert (done.code, done.stderr) == (0, ""), done
        return done.stdout.splitlines()

    async def disk(self, name: str, copy: Path) -> Path:
        """A raw copy of a disk as it is now; it must stand still."""
        [disk] = [disk for disk in self.vm.disks if disk.id == name]
        assert disk.path is not None
        await run_img(self.vm.qemu, "convert", "-U", "-f", disk.format, "-O", "raw", disk.path, copy)
        return copy


@dataclass(frozen=True)
class Round:
    """What one backup with a tool left: its log, the status after it, and the maps."""

    tool: Tool
    folder: Path
    qemu: Qemu

    def script(self, command: str, ending: str = "") -> str:
        """Run the tool, then note down what the mount says of it."""
        out = shlex.quote(str(self.folder))
        note = f"date +%s > {out}/ended; cp .qfsbackup/status.json maps/*.json vm.json {out}/ || exit 99"
        return f"rm -rf {out}; mkdir {out}; ( {command} ) > {out}/log 2>&1; code=$?; {note}; {ending}\nexit $code"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def dirty_chunks(self, disk: str, chunk: int = CHUNK) -> set[str]:
        """The chunks that the map touches."""
        extents = json.loads((self.folder / f"{disk}.json").read_text())
        dirty = [(extent["offset"], extent["length"]) for extent in extents if extent["type"]]
        numbers = {n for start, length in dirty for n in range(start // chunk, (start + length - 1) // chunk + 1)}
        return set(chunk_names(disk, numbers))

    def bitmaps(self) -> dict[str, str]:
        """The status of each disk's bitmap."""
        return {disk["name"]: disk["bitmap"] for disk in self._json("vm.json")["disks"]}

    def check_nbd_bytes(self, chunks: int) -> None:
        """Raise AssertionError if more was read than these chunks and 2 %.

        Besides, every 2 s each disk is asked whether the snapshot is whole: for a sector, before QEMU 8.0 a cluster.
        """
        status = self._json("status.json")
        instant = datetime.fromisoformat(status["instant"]).timestamp()
        probes = (int((self.folder / "ended").read_text()) - int(instant)) // 2 + 2
        probed = probes * len(status["disks"]) * (request_unit(self.qemu.version) or 512)
        read = sum(disk["nbd_bytes"] for disk in status["disks"].values())
        assert read <= chunks * CHUNK * 1.02 + probed, f"{read} bytes of {chunks} chunks, {probes} times probed"

    def _json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())


def chunk_names(disk: str, numbers: Iterable[int]) -> list[str]:
    """The paths of chunks."""
    return [f"chunks/{disk}/{number // 256:03}/{number:08}" for number in numbers]


def all_chunks() -> set[str]:
    """Those of a bed's two disks."""
    return {name for disk in DISKS for name in chunk_names(disk, range(CHUNKS))}


@contextlib.asynccontextmanager
async def bed(
    qemu: Qemu, folder: Path, *more: Disk, name: str = "vm", extra_args: Iterable[str] = ()
) -> AsyncIterator[Bed]:
    """A paused VM with a raw and a qcow2 disk of 2 MiB of random data; they stand still but for `guest_io`."""
    if not (folder / "vda.img").exists():
        await fill(qemu, folder)
    disks = [Disk("vda", folder / "vda.img", SIZE), Disk("vdb", folder / "vdb.img", SIZE, format="qcow2"), *more]
    async with (
        running_vm(qemu, folder, disks, name=name, extra_args=list(extra_args)) as vm,
        taken_away(folder / "mnt", vm.qmp),
    ):
        yield Bed(vm, folder)


async def fill(qemu: Qemu, folder: Path) -> None:
    """Make the images of `bed`; a quarter of each is holes."""
    for number, disk in enumerate(DISKS):
        content = make_random(folder / "content", SIZE, seed=number, hole_every=4)
        form = "raw" if disk == "vda" else "qcow2"
        await run_img(qemu, "convert", "-f", "raw", "-O", form, content, folder / f"{disk}.img")


async def stats(mount: Mount) -> dict[str, tuple[int, int, int, int]]:
    """Size, mtime, ctime and inode of every chunk: what a tool looks at."""

    def look() -> dict[str, tuple[int, int, int, int]]:
        found = {}
        for path in sorted((mount.path / "chunks").glob("*/*/*")):
            stat = path.stat()
            found[str(path.relative_to(mount.path))] = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
        return found

    return await aside(look)


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """What a tool that saw `before` would read again."""
    return {path for path in after if before.get(path) != after[path]}


class SkippingTool:
    """What a tool holds that reads a chunk again only where its attributes have changed."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[int, ...]] = {}
        self.held: dict[str, bytes] = {}

    async def take(self, mount: Mount) -> set[str]:
        """Back up; which chunks were read."""
        now = await stats(mount)
        moved = changed(self.seen, now)
        for name in moved:
            self.held[name] = await aside((mount.path / name).read_bytes)
        self.held = {name: self.held[name] for name in now}
        self.seen = dict(now)
        return moved

    def image(self, disk: str) -> bytes:
        """The disk, put together from what it holds."""
        return b"".join(content for name, content in sorted(self.held.items()) if name.split("/")[1] == disk)


def bitmap_of(description: dict[str, Any]) -> dict[str, str]:
    """The bitmaps' status by disk, of vm.json."""
    return {disk["name"]: disk["bitmap"] for disk in description["disks"]}


def words(line: str) -> list[str]:
    """The columns of a line of `checkpoints`."""
    return re.split(r"  +", line)
