# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whole mounts of `libvirt:NAME`: the bytes, and that libvirt and QEMU are as they were afterwards."""

import os
from pathlib import Path

import pytest

from tests.harness.files import assert_same
from tests.harness.libvirt import Domain
from tests.harness.mount import aside, mounted
from tests.harness.qemu import run_img
from tests.libvirt.conftest import NAMES, distribution

pytest.importorskip("libvirt")


async def copies(domain: Domain, folder: Path) -> dict[str, Path]:
    """Raw copies of the disks as they are now; they must stand still."""
    folder.mkdir()  # noqa: ASYNC240 - a test's
    for disk in domain.disks:
        assert disk.path is not None
        await domain.io(disk.id, "flush")
        await run_img(distribution(), "convert", "-U", "-f", disk.format, "-O", "raw", disk.path, folder / disk.id)
    return {disk.id: folder / disk.id for disk in domain.disks}


async def fill(domain: Domain) -> None:
    """Let the guest write something everywhere."""
    for number, name in enumerate(NAMES):
        await domain.io(name, f"write -P {number + 1} {number}M 3M")
        await domain.io(name, "write -P 9 15M 512k")


async def test_the_disks_as_they_were_and_all_as_it_was(paused: Domain, tmp_path: Path) -> None:
    await fill(paused)
    before, expected = await paused.view(), await copies(paused, tmp_path / "expected")
    async with mounted(paused.source, tmp_path / "mnt") as mount:
        for name in NAMES:
            await paused.io(name, "write -P 77 1M 4M")
        for name in NAMES:
            await aside(assert_same, mount.image(name), expected[name])
        assert before["xml"] == await paused.virsh("dumpxml")
        assert before["disks"] == await paused.virsh("domblklist")
        assert (await mount.json("vm.json"))["vm"] == paused.name
        config = mount.path / "config"
        assert sorted(await aside(os.listdir, config)) == ["domain-live.xml", "domain.xml", "qemu.json"]
    assert await paused.view() == before
