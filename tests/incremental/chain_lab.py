# SPDX-License-Identifier: LGPL-2.1-or-later
"""A VM that is started and stopped as a test likes, and committed backups of it: real but for FUSE, which takes a
second a mount.

After each backup, what two tools hold is compared with what the disks are, found without the product: one reads a chunk
again only where its time or size has changed, the other where its time is not before the start of its own last run.
"""

import json
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio

from qfsbackup.contracts import SnapshotDisk
from qfsbackup.fs.grid import Grid
from qfsbackup.mount.chain import generations, open_chain
from tests.harness.disk import MIB, Disk
from tests.harness.files import make_random
from tests.harness.qemu import Qemu, run_img
from tests.harness.vm import Vm, running_vm
from tests.vm.support import Snapshots, copied, make_source

SIZE = MIB
Event = Callable[["ChainLab"], Awaitable[dict[str, str]]]  # tells what the next backup must say of each disk
CHUNK = 64 * 1024


class ChainLab:
    """`vm` is the VM that runs; `off` and `boot` end and start it. Everything is in `folder`."""

    def __init__(self, qemu: Qemu, folder: Path) -> None:
        self.qemu = qemu
        self.folder = folder
        self.seeds = 0
        self._boots = 0
        self._running = AsyncExitStack()
        self._vm: Vm | None = None
        self._held: dict[str, dict[int, tuple[int, bytes]]] = {}  # disk -> chunk's number -> time and content
        self._since: dict[str, tuple[int, dict[int, bytes]]] = {}  # disk -> start of the last run, chunks by number

    @property
    def vm(self) -> Vm:
        assert self._vm is not None
        return self._vm

    async def image(self, name: str, *options: str | Path, size: int = SIZE, form: str = "qcow2") -> Path:
        """A new image of random data; with a backing file among the options, of nothing of its own."""
        path = self.folder / f"{name}.img"
        if "-b" in options:
            await run_img(self.qemu, "create", "-q", "-f", form, *options, path)
            return path
        self.seeds += 1
        content = make_random(self.folder / "content", size, seed=self.seeds, hole_every=4)
        await run_img(self.qemu, "convert", "-f", "raw", "-O", form, *options, content, path)
        return path

    async def boot(self, disks: Sequence[Disk], *arguments: str) -> None:
        """Start a VM, paused."""
        self._boots += 1
        name = f"vm{self._boots}"
        entering = running_vm(self.qemu, self.folder, disks, extra_args=arguments, name=name)
        self._vm = await self._running.enter_async_context(entering)

    async def off(self) -> None:
        """Shut it down."""
        await self.vm.monitor.execute("quit")
        assert await self.vm.process.wait() == 0
        await self._running.aclose()
        self._vm = None

    async def close(self) -> None:
        """The end of the test."""
        await self._running.aclose()

    def copy(self, source: str, target: str) -> None:
        """Copy an image as it is."""
        shutil.copyfile(self.folder / f"{source}.img", self.folder / f"{target}.img")

    async def img(self, *words: str | Path) -> None:
        """Run qemu-img."""
        await run_img(self.qemu, *words)

    async def devices(self) -> Mapping[str, Mapping[str, Any]]:
        """The entries of query-block by the name that a disk has."""
        found = {}
        for block in await self.vm.monitor.execute("query-block"):
            path = str(block.get("qdev", ""))
            name = path.removeprefix("/machine/peripheral/").split("/")[0] if "anon" not in path else block["device"]
            found[name] = block
        return found

    async def write(self, disk: str, what: str) -> None:
        """Let the guest write: what qemu-io understands."""
        block = (await self.devices())[disk]
        path = block["qdev"]
        place = f"-d {path}" if path.startswith("/") else f"-d /machine/peripheral/{path}"
        line = f'qemu-io {place} "{what}"'
        said = await self.vm.monitor.execute("human-monitor-command", {"command-line": line})
        assert "rror" not in said, said

    async def content(self, disk: str) -> bytes:
        """A disk as it is now, found without the product."""
        node = (await self.devices())[disk]["inserted"]["node-name"]
        socket, copy = self.folder / "now.sock", self.folder / "now"
        run = self.vm.monitor.execute
        await run("nbd-server-start", addr={"type": "unix", "data": {"path": str(socket)}})
        await run("block-export-add", {"type": "nbd", "id": "now", "name": "now", "node-name": node})
        await trio.run_process(["nbdcopy", f"nbd+unix:///now?socket={socket}", str(copy)])
        await run("nbd-server-stop")
        return copy.read_bytes()

    def source(self, **more: Any) -> Snapshots:
        """What backups are taken from."""
        return make_source(self.vm, self.folder, generations=partial(generations, self.folder), **({"vm": "vm"} | more))

    async def backup(
        self, target: str = "nas", *, in_image: bool = True, commit: bool = True, **more: Any
    ) -> dict[str, SnapshotDisk]:
        """Back up and commit; the tool then holds the disks, byte for byte. What was said of each disk."""
        held: dict[str, list[bytes]] = {}
        async with AsyncExitStack() as stack:
            chain = await stack.enter_async_context(open_chain(target, self.folder, CHUNK, in_image=in_image))
            source = self.source(checkpoint=chain.request, **more)
            snapshot = await stack.enter_async_context(source.snapshot())
            disks = [await stack.enter_async_context(disk.open()) for disk in snapshot.disks]
            grids = await chain.grids(snapshot, await chain.begin(snapshot), disks)
            for found in snapshot.disks:
                content = await copied(found, self.folder / "copy")
                held[found.name] = self._take(f"{target} {found.name}", grids[found.name], content)
            if commit:
                await chain.commit(snapshot, disks, source.status)
        for name, contents in held.items():
            now = await self.content(name)
            assert [content == now for content in contents] == [True, True], f"what is held of {name} is another disk"
        return {disk.name: disk for disk in snapshot.disks}

    def _take(self, disk: str, grid: Grid, content: bytes) -> list[bytes]:
        """One run of both tools. All that each holds then."""
        return [self._take_other(disk, grid, content), self._take_newer(disk, grid, content)]

    def _take_newer(self, disk: str, grid: Grid, content: bytes) -> bytes:
        """Read as GNU tar does: what is as new as the last run."""
        start = time.time_ns()
        last, kept = self._since.get(disk, (0, {}))
        new = {
            number: kept[number] if changed < last and number in kept else content[slice(*grid.span(number))]
            for number, changed in enumerate(grid.times)
        }
        self._since[disk] = start, new
        return b"".join(new.values())

    def _take_other(self, disk: str, grid: Grid, content: bytes) -> bytes:
        """Read as rsync does: what has another time or size."""
        old, new = self._held.get(disk, {}), {}
        for number, changed in enumerate(grid.times):
            start, end = grid.span(number)
            kept = old.get(number)
            same = kept is not None and kept[0] == changed and len(kept[1]) == end - start
            new[number] = kept if same and kept else (changed, content[start:end])
        self._held[disk] = new
        return b"".join(piece for _, piece in new.values())

    async def bitmaps(self) -> set[str]:
        """The names of all bitmaps in QEMU."""
        nodes = await self.vm.monitor.execute("query-named-block-nodes", flat=True)
        return {bitmap["name"] for node in nodes for bitmap in node.get("dirty-bitmaps", ()) if bitmap.get("name")}

    async def job(self, command: str, **arguments: Any) -> None:
        """Run a block job to its end, over the pivot where it has one."""
        await self.vm.monitor.execute(
            command, {"job-id": "job"} | {k.replace("_", "-"): v for k, v in arguments.items()}
        )
        if command != "block-stream":
            await self.vm.monitor.event("BLOCK_JOB_READY", device="job")
            await self.vm.monitor.execute("block-job-complete", device="job")
        await self.vm.monitor.event("BLOCK_JOB_COMPLETED", device="job")

    async def plug(self, name: str, node: str) -> None:
        """Give a SCSI disk to the VM, which must have the controller scsi0."""
        device = {"driver": "scsi-hd", "id": name, "drive": node, "bus": "scsi0.0"}
        await self.vm.monitor.execute("device_add", device)

    async def unplug(self, name: str) -> None:
        """Take a SCSI disk away; its nodes stay."""
        await self.vm.monitor.execute("device_del", id=name)
        await self.vm.monitor.event("DEVICE_DELETED", device=name)


@asynccontextmanager
async def chain_lab(qemu: Qemu, folder: Path) -> AsyncIterator[ChainLab]:
    """A lab for the length of the block."""
    lab = ChainLab(qemu, folder)
    try:
        yield lab
    finally:
        await lab.close()


def said(disks: Mapping[str, SnapshotDisk]) -> dict[str, str]:
    """The bitmaps' status, and the reason behind it."""
    return {name: f"{disk.bitmap} {disk.bitmap_reason}".strip() for name, disk in disks.items()}


def blockdev(node: str, path: Path, form: str = "qcow2", *, read_only: bool = False) -> list[str]:
    """An image without a device, on the command line."""
    options: dict[str, Any] = {"driver": form, "node-name": node, "file": {"driver": "file", "filename": str(path)}}
    options["read-only"] = read_only
    return ["-blockdev", json.dumps(options)]


def drives(paths: Iterable[Path]) -> list[str]:
    """Drives that QEMU gives names to: virtio0, virtio1, ..."""
    return [word for path in paths for word in ("-drive", f"file={path},format=qcow2,if=virtio")]
