# SPDX-License-Identifier: LGPL-2.1-or-later
"""A libvirt, and a domain with three disks."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.harness.disk import MIB, Disk
from tests.harness.libvirt import Domain, Libvirt, libvirt
from tests.harness.qemu import Qemu, available

NAMES = ("vda", "sda", "vdb")


def disks(folder: Path, size: int = 16 * MIB) -> list[Disk]:
    """A qcow2 image on virtio, a raw one on SCSI, and one in an iothread where this QEMU survives that."""
    iothread = distribution().version >= (8, 2, 0)
    return [
        Disk("vda", folder / "vda.qcow2", size, format="qcow2"),
        Disk("sda", folder / "sda.raw", size, interface="virtio-scsi"),
        Disk("vdb", folder / "vdb.raw", size, iothread=iothread),
    ]


def distribution() -> Qemu:
    """The QEMU that the distribution's libvirt knows: libvirt 9.0 cannot probe QEMU 10."""
    return available()[0]


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Libvirt]:
    """libvirtd."""
    async with libvirt(tmp_path) as host:
        yield host


@pytest.fixture
async def paused(host: Libvirt, tmp_path: Path) -> AsyncIterator[Domain]:
    """A domain whose CPUs never run."""
    async with host.domain(distribution(), tmp_path, disks(tmp_path)) as domain:
        yield domain


@pytest.fixture
async def booted(host: Libvirt, tmp_path: Path) -> AsyncIterator[Domain]:
    """A domain whose guest has booted, with its agent."""
    async with host.domain(distribution(), tmp_path, disks(tmp_path), guest=True) as domain:
        yield domain
