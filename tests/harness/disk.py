# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest's disk: what it is, and how that is said to QEMU.

With `-blockdev` (the default) the nodes are named `<id>-file` (protocol), `<id>-node` (format) and, with a throttle
filter, `<id>-throttle`; with legacy `-drive` the drive is named `drive-<id>` and the nodes have generated names.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .qemu import Qemu, run_img

MIB = 1024 * 1024


@dataclass(frozen=True)
class Disk:
    """One disk or CD drive. An image that is not there yet is made (zeros, `size` bytes); no path: no medium."""

    id: str
    path: Path | None = None
    size: int = 64 * MIB
    format: Literal["raw", "qcow2"] = "raw"
    interface: Literal["virtio-blk", "virtio-scsi", "ide"] = "virtio-blk"
    legacy: bool = False
    iothread: bool = False
    throttle: int | None = None  # a throttle filter on top: bytes written per second, 0 for no limit
    read_only: bool = False
    cdrom: bool = False

    @property
    def node(self) -> str | None:
        """The node that the guest device is attached to; None where its name is a generated one."""
        if self.legacy or self.path is None:
            return None
        return f"{self.id}-node" if self.throttle is None else f"{self.id}-throttle"

    async def create(self, qemu: Qemu) -> None:
        """Make the image unless it exists."""
        if self.path is not None and not self.path.exists():
            await run_img(qemu, "create", "-q", "-f", self.format, self.path, str(self.size))

    def arguments(self, place: dict[str, Any]) -> list[str]:
        """QEMU's command line for this disk at `place` (the bus and what else says where)."""
        backend = [] if self.path is None else self._drive() if self.legacy else self._blockdev()
        return [*backend, "-device", json.dumps(self._device() | place)]

    def _device(self) -> dict[str, Any]:
        kind = {"virtio-blk": "virtio-blk-pci", "virtio-scsi": "scsi-hd", "ide": "ide-hd"}[self.interface]
        device: dict[str, Any] = {"driver": kind.replace("-hd", "-cd") if self.cdrom else kind, "id": self.id}
        if self.path is not None:
            device["drive"] = f"drive-{self.id}" if self.legacy else self.node
        if self.interface == "virtio-blk" and self.iothread:
            device["iothread"] = "iothread0"
        if not self.cdrom:
            device["serial"] = self.id
        return device

    def _blockdev(self) -> list[str]:
        protocol = {
            "driver": "file",
            "node-name": f"{self.id}-file",
            "filename": str(self.path),
            "discard": "unmap",
            "read-only": self.read_only,
        }
        image = {
            "driver": self.format,
            "node-name": f"{self.id}-node",
            "file": f"{self.id}-file",
            "discard": "unmap",
            "read-only": self.read_only,
        }
        nodes = ["-blockdev", json.dumps(protocol), "-blockdev", json.dumps(image)]
        if self.throttle is None:
            return nodes
        group = {
            "qom-type": "throttle-group",
            "id": f"{self.id}-group",
            "limits": {"bps-write": self.throttle},
        }
        top = {
            "driver": "throttle",
            "node-name": f"{self.id}-throttle",
            "file": f"{self.id}-node",
            "throttle-group": f"{self.id}-group",
            "read-only": self.read_only,
        }
        return ["-object", json.dumps(group), *nodes, "-blockdev", json.dumps(top)]

    def _drive(self) -> list[str]:
        options = [
            f"file={self.path}",
            f"format={self.format}",
            "if=none",
            f"id=drive-{self.id}",
            "discard=unmap",
            f"read-only={'on' if self.read_only else 'off'}",
        ]
        if self.throttle is not None:
            options.append(f"throttling.bps-write={self.throttle}")
        return ["-drive", ",".join(options)]


def arguments(disks: Sequence[Disk], machine: str) -> list[str]:
    """QEMU's command line for all disks, with the controllers and the iothread that they need."""
    result = ["-object", "iothread,id=iothread0"] if any(disk.iothread for disk in disks) else []
    for name in sorted({_scsi_controller(disk) for disk in disks if disk.interface == "virtio-scsi"}):
        result += ["-device", f"virtio-scsi-pci,id={name}" + (",iothread=iothread0" if name == "scsi1" else "")]
    ide = _ide_places(machine)
    for disk in disks:
        scsi = {"bus": f"{_scsi_controller(disk)}.0"} if disk.interface == "virtio-scsi" else {}
        result += disk.arguments(next(ide) if disk.interface == "ide" else scsi)
    return result


def _scsi_controller(disk: Disk) -> str:
    return "scsi1" if disk.iothread else "scsi0"


def _ide_places(machine: str) -> Iterator[dict[str, Any]]:
    """An AHCI port takes one drive, a PIIX channel two."""
    per_bus = 1 if machine == "q35" else 2
    return ({"bus": f"ide.{index // per_bus}", "unit": index % per_bus} for index in itertools.count())
