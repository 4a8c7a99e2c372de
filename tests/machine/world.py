# SPDX-License-Identifier: LGPL-2.1-or-later
"""A VM whose CPUs do not run, its images, and what there is in QEMU: all without the product.

    slot (a device of the guest) --> image (a folder with files of one disk, the newest overlay is the `top`)

Flavour `blockdev`: SCSI disks with ids, which can be unplugged without a guest's help; the disks are called by these
ids. Flavour `drive`: `-drive if=virtio`, where names come from the order (virtio0, virtio1, ...).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.harness.disk import MIB, Disk
from tests.harness.files import make_random
from tests.harness.monitor import QmpError
from tests.harness.qemu import Qemu, run_img
from tests.harness.qmp_proxy import Proxy, running_proxy
from tests.harness.vm import Vm, running_vm
from tests.machine.portal import Held, Portal

Flavour = Literal["blockdev", "drive"]
Format = Literal["raw", "qcow2"]
SIZE = 2 * MIB


@dataclass(frozen=True)
class Image:
    """A disk's content."""

    folder: Path
    format: Format  # of the newest overlay
    base: Format
    top: str = "base"

    @property
    def path(self) -> Path:
        return self.folder / self.top


@dataclass
class Slot:
    """A device of the guest."""

    id: str
    image: Image
    plugged: bool = True
    node: str = ""  # where it is not plugged: the node to plug it with


class World:
    """The VM is off until `start()`."""

    def __init__(self, portal: Portal, qemu: Qemu, folder: Path, flavour: Flavour) -> None:
        self.portal, self.qemu, self.folder, self.flavour = portal, qemu, folder, flavour
        self.numbers = 0
        self.slots = [Slot("vda", self.new_image("raw")), Slot("vdb", self.new_image("qcow2"))]
        self._running: Held[tuple[Vm, Proxy]] | None = None

    # ---- images ----

    def number(self) -> int:
        """One that was not used before, for names."""
        self.numbers += 1
        return self.numbers

    def new_folder(self, form: Format) -> Image:
        """An image whose file is to be made."""
        image = Image(self.folder / f"image{self.number()}", form, form)
        image.folder.mkdir()
        return image

    def new_image(self, form: Format, size: int = SIZE) -> Image:
        """An image of random data, a quarter of it holes."""
        image = self.new_folder(form)
        content = make_random(self.folder / "content", size, seed=self.number(), hole_every=4)
        self.img("convert", "-f", "raw", "-O", form, content, image.path)
        return image

    def copy_image(self, image: Image) -> Path:
        """A copy of an image's files, which `replace_image` takes."""
        copy = self.folder / f"copy{self.number()}"
        shutil.copytree(image.folder, copy)
        return copy

    def replace_image(self, image: Image, copy: Path) -> None:
        """Put a copy in the place of an image."""
        shutil.rmtree(image.folder)
        shutil.copytree(copy, image.folder)

    def img(self, *words: str | Path) -> str:
        """Run qemu-img."""
        return self.portal.call(run_img, self.qemu, *words)

    # ---- the VM ----

    @property
    def on(self) -> bool:
        return self._running is not None

    @property
    def vm(self) -> Vm:
        assert self._running
        return self._running.value[0]

    @property
    def proxy(self) -> Proxy:
        """What the product connects to."""
        assert self._running
        return self._running.value[1]

    @property
    def socket(self) -> Path:
        """The same path for ever."""
        return self.folder / "qmp"

    def start(self) -> None:
        """Switch the VM on, with every disk plugged."""
        for slot in self.slots:
            slot.plugged = True
        self._running = self.portal.hold(self._life(f"vm{self.number()}"))

    @asynccontextmanager
    async def _life(self, name: str) -> AsyncIterator[tuple[Vm, Proxy]]:
        disks, words = list[Disk](), list[str]()
        for slot in self.slots:
            if self.flavour == "blockdev":
                disks.append(Disk(slot.id, slot.image.path, format=slot.image.format, interface="virtio-scsi"))
            else:
                words += ["-drive", f"if=virtio,file={slot.image.path},format={slot.image.format},discard=unmap"]
        self.socket.unlink(missing_ok=True)
        async with (
            running_vm(self.qemu, self.folder, disks, extra_args=words, name=name) as vm,
            running_proxy(vm.qmp, self.socket) as proxy,
        ):
            yield vm, proxy

    def stop(self, *, killed: bool = False) -> None:
        """Switch it off, or pull the plug of the host."""
        running, self._running = self._running, None
        assert running
        vm, _ = running.value
        if killed:
            vm.process.kill()
        else:
            with suppress(EOFError):
                self.portal.call(vm.monitor.execute, "quit")
        self.portal.call(vm.process.wait)
        running.release()

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command; `_` stands for `-`. Raises QmpError."""

        async def execute() -> Any:
            try:
                return await self.vm.monitor.execute(command, **arguments)
            except EOFError as error:
                await self.vm.process.wait()
                error.add_note(f"QEMU ended with {self.vm.process.returncode}:\n{self.vm.process.log}")
                raise

        return self.portal.call(execute)

    def event(self, name: str, **data: Any) -> dict[str, Any]:
        """Wait for an event."""

        async def wait() -> dict[str, Any]:
            return await self.vm.monitor.event(name, **data)

        return self.portal.call(wait)

    def refused(self, command: str, **arguments: Any) -> str:
        """Run a QMP command; why QEMU refuses it, if it does."""
        try:
            self.qmp(command, **arguments)
        except QmpError as error:
            return str(error)
        return ""

    # ---- the disks ----

    @property
    def plugged(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.plugged]

    def name(self, slot: Slot) -> str:
        """What the product calls a disk."""
        return slot.id if self.flavour == "blockdev" else f"virtio{self.slots.index(slot)}"

    def block(self, slot: Slot) -> dict[str, Any]:
        """What query-block says of a disk."""
        blocks: list[dict[str, Any]] = self.qmp("query-block")
        key = "qdev" if self.flavour == "blockdev" else "device"
        [found] = [block for block in blocks if block.get(key) == self.name(slot)]
        return found

    def io(self, slot: Slot, command: str) -> None:
        """Let a device do what its guest would. Raises AssertionError where that fails."""
        before = len(self.vm.process.log)
        line = f'qemu-io -d {self.block(slot)["qdev"]} "{command}"'
        said = self.qmp("human-monitor-command", command_line=line) + self.vm.process.log[before:]
        assert not re.search("rror|failed", said), f"{command}: {said}"

    def content(self, slot: Slot) -> bytes:
        """The bytes of a disk, read from its image by another process."""
        self.io(slot, "flush")
        raw = self.folder / "raw"
        self.img("convert", "-U", "-f", slot.image.format, "-O", "raw", slot.image.path, raw)
        return raw.read_bytes()
