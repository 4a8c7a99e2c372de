# SPDX-License-Identifier: LGPL-2.1-or-later
"""NBD servers that break the protocol: the whole command ends with a clear error, and soon; nothing is made up."""

import struct
from pathlib import Path

import pytest

from tests.faults.hostile_server import Behaviour, hostile
from tests.faults.support import reads, unmounted, until_eio
from tests.harness.disk import MIB
from tests.harness.mount import aside, is_mounted, mounted, qfsbackup, taken_away

REFUSED = {
    "garbage": (Behaviour(greeting=b"HTTP/1.1 400 Bad Request\r\n\r\n"), "does not speak NBD"),
    "nothing": (Behaviour(greeting=b""), "does not speak NBD"),
    "another size for each connection": (Behaviour(sizes=[MIB, MIB, 2 * MIB]), "offers a disk of 2097152 bytes"),
    "no size that can be": (Behaviour(sizes=[(1 << 64) - 1]), ""),
    "extents without a length": (Behaviour(extents=struct.pack(">IIII", 0, 0, 0, 0)), "describes no extent"),
    "no extents": (Behaviour(extents=b""), "extent"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_it_is_refused(tmp_path: Path, name: str) -> None:
    behaviour, words = REFUSED[name]
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    async with hostile(tmp_path / "nbd", behaviour) as uri, taken_away(mountpoint):
        done = await qfsbackup("mount", uri, mountpoint)
        done.refused(32, words)
        assert not is_mounted(mountpoint)


READS = {
    "the connection is closed": b"",
    "garbage": b"\xff" * 64,
    "an answer to what nobody asked": struct.pack(">IIQ", 0x67446698, 0, 0xDEAD),
}


@pytest.mark.parametrize("name", READS)
async def test_a_read_that_is_answered_wrongly_is_an_error(tmp_path: Path, name: str) -> None:
    async with (
        hostile(tmp_path / "nbd", Behaviour(read=READS[name])) as uri,
        mounted(uri, tmp_path / "mnt", expected=(2,)) as mount,
    ):
        [image] = (await mount.json("vm.json"))["disks"]
        await until_eio(mount.image(image["name"]))
        assert (await mount.status())["state"] == "broken"
        await unmounted(mount.path)
        assert await mount.process.wait() == 2


ODD = {
    "flags that nobody knows": struct.pack(">II", MIB, 0xFFFFFFFC),
    "holes that are not zero": struct.pack(">II", MIB, 1),
    "small extents": struct.pack(">II", 512, 0) * 64,
}


@pytest.mark.parametrize("name", ODD)
async def test_odd_extents_hide_no_data(tmp_path: Path, name: str) -> None:
    """What a server says in a strange way is read, rather than taken for zeros."""
    async with hostile(tmp_path / "nbd", Behaviour(extents=ODD[name])) as uri, mounted(uri, tmp_path / "mnt") as mount:
        [image] = (await mount.json("vm.json"))["disks"]
        assert await reads(mount.image(image["name"])) == bytes(MIB)
        assert (await mount.status())["disks"][image["name"]]["nbd_bytes"] >= MIB


async def test_extents_beyond_the_end_are_cut_or_refused(tmp_path: Path) -> None:
    """libnbd 1.14 passes them on, and they are cut; 1.22 says that this breaks the protocol, as it does."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    beyond = Behaviour(extents=struct.pack(">II", 0xFFFFFE00, 0))
    async with hostile(tmp_path / "nbd", beyond) as uri, taken_away(mountpoint):
        done = await qfsbackup("mount", uri, mountpoint)
        if done.code:
            done.refused(32, "breaks the protocol")
            return
        [image] = await aside(lambda: list((mountpoint / "images").iterdir()))
        assert await reads(image) == bytes(MIB)
        assert (await qfsbackup("umount", mountpoint)).code == 0
