# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whole mounts of `libvirt:NAME`: the bytes, and that libvirt and QEMU are as they were afterwards."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import trio

from tests.harness.disk import MIB
from tests.harness.files import assert_same
from tests.harness.libvirt import Domain
from tests.harness.mount import DONE, aside, command, ending, is_mounted, mounted, qfsbackup
from tests.harness.qemu import run_img
from tests.libvirt.conftest import NAMES, distribution

PULL = """<domainbackup mode='pull'><server transport='unix' socket='{folder}/pull.sock'/><disks>
<disk name='vda' type='file'><scratch file='{folder}/scratch'/></disk>
<disk name='sda' backup='no'/><disk name='vdb' backup='no'/></disks></domainbackup>"""


async def copies(domain: Domain, folder: Path) -> dict[str, Path]:
    """Raw copies of the disks as they are now; they must stand still."""
    folder.mkdir()  # noqa: ASYNC240 - a test's
    for disk in domain.disks:
        assert disk.path is not None
        await domain.io(disk.id, "flush")
        await run_img(distribution(), "convert", "-U", "-f", disk.format, "-O", "raw", disk.path, folder / disk.id)
    return {disk.id: folder / disk.id for disk in domain.disks}


async def until(holds: Callable[[], bool]) -> None:
    """Wait for what tells nobody."""
    with trio.fail_after(15):
        while not holds():  # noqa: ASYNC110 - see above
            await trio.sleep(0.02)


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


async def test_two_incremental_rounds(paused: Domain, tmp_path: Path) -> None:
    await fill(paused)
    (tmp_path / "state").mkdir(mode=0o700)
    options, held = f"target=nas,state={tmp_path / 'state'},chunk=1m", tmp_path / "held"
    for number, status in enumerate(["new", "reuse", "reuse"]):
        expected = await copies(paused, tmp_path / f"expected{number}")
        async with mounted(paused.source, tmp_path / "mnt", options) as mount:
            assert {disk["bitmap"] for disk in (await mount.json("vm.json"))["disks"]} == {status}
            assert (await command("rsync", "-a", "--inplace", f"{mount.path}/chunks", held)).code == 0
            read = sum(disk["nbd_bytes"] for disk in (await mount.status())["disks"].values())
            assert number == 0 or read < 3 * 3 * MIB
            assert await qfsbackup("commit", mount.path) == DONE
            for name in NAMES:  # what comes after the instant is in the next round
                await paused.io(name, f"write -P {50 + number} 8M 640k")
        for name in NAMES:
            chunks = sorted((held / "chunks" / name).glob("*/*"))
            assert b"".join(chunk.read_bytes() for chunk in chunks) == expected[name].read_bytes()
    lines = (await qfsbackup("checkpoints", paused.source, "-o", f"state={tmp_path / 'state'}")).stdout
    assert sorted(line.split()[1] for line in lines.splitlines()) == sorted(NAMES)


async def test_a_killed_worker_and_then_both(paused: Domain, tmp_path: Path) -> None:
    before = await paused.view()
    async with mounted(paused.source, tmp_path / "mnt", expected=[137]) as mount:
        worker = await mount.worker()
        async with ending(worker):
            os.kill(worker, signal.SIGKILL)
        with trio.fail_after(20):
            await mount.process.wait()
    assert await paused.view() == before
    async with mounted(paused.source, tmp_path / "mnt", expected=[-signal.SIGKILL]) as mount:
        worker = await mount.worker()
        mount.process.kill()
        async with ending(worker):
            os.kill(worker, signal.SIGKILL)
    assert await paused.view() != before
    done = await qfsbackup("cleanup", paused.source)
    assert (done.code, done.stderr) == (0, "")
    assert "qfsbackup-filter-2" in done.stdout
    assert await paused.view() == before


async def test_libvirtd_restarted_during_a_mount(paused: Domain, tmp_path: Path) -> None:
    await fill(paused)
    before, expected = await paused.view(), await copies(paused, tmp_path / "expected")
    async with mounted(paused.source, tmp_path / "mnt") as mount:
        await paused.host.stop(signal.SIGKILL)
        await aside(assert_same, mount.image("vda"), expected["vda"])
        await paused.host.start()
        await aside(assert_same, mount.image("sda"), expected["sda"])
    assert await paused.view() == before


async def test_libvirtd_away_at_the_end_of_a_mount(paused: Domain, tmp_path: Path) -> None:
    before = await paused.view()
    async with mounted(paused.source, tmp_path / "mnt") as mount, trio.open_nursery() as nursery:
        await paused.host.stop(signal.SIGKILL)
        nursery.start_soon(command, "umount", mount.path)
        await until(lambda: not is_mounted(mount.path))
        (await qfsbackup("cleanup", paused.source)).refused(32, "Failed to connect")
        await paused.host.start()
        with trio.fail_after(20):
            await mount.process.wait()
    assert await paused.view() == before


async def test_a_domain_that_is_destroyed_during_a_mount(paused: Domain, tmp_path: Path) -> None:
    async with mounted(paused.source, tmp_path / "mnt", expected=[2]) as mount:
        await paused.virsh("destroy")
        await until(lambda: "shut off" in mount.process.log)
        assert (await mount.status())["broken"]
    await paused.virsh("start", "--paused")
    async with mounted(paused.source, tmp_path / "mnt"):
        pass


async def test_a_job_of_libvirts_when_we_come_is_left_alone(paused: Domain, tmp_path: Path) -> None:
    await paused.virsh("blockcopy", "vda", tmp_path / "copy", "--transient-job")
    (tmp_path / "mnt").mkdir()
    refused = await qfsbackup("mount", paused.source, tmp_path / "mnt")
    refused.refused(32, "a block job of disk vda is running")
    await paused.virsh("blockjob", "vda", "--abort")
    (tmp_path / "pull.xml").write_text(PULL.format(folder=tmp_path))
    await paused.virsh("backup-begin", tmp_path / "pull.xml")
    (await qfsbackup("mount", paused.source, tmp_path / "mnt")).refused(32, "already exports disks")
    assert "Backup" in await paused.virsh("domjobinfo")
    await paused.virsh("domjobabort")
    async with mounted(paused.source, tmp_path / "mnt"):
        pass


async def test_a_domain_that_is_shut_off(paused: Domain, tmp_path: Path) -> None:
    await paused.virsh("destroy")
    refused = await qfsbackup("mount", paused.source, tmp_path)
    refused.refused(32, f"domain {paused.name} does not run")
