# SPDX-License-Identifier: LGPL-2.1-or-later
"""The test bed itself: what it promises, and that its checks can fail."""

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.harness.agent import ask
from tests.harness.disk import MIB, Disk
from tests.harness.files import allocated, assert_same, data_extents, first_difference, make_random
from tests.harness.monitor import QmpError, connected
from tests.harness.mount import aside
from tests.harness.nbd_server import make_certificates, nbdkit, qemu_nbd, storage_daemon
from tests.harness.pattern import PatternError, count_sectors, last_of_prefix
from tests.harness.process import CrashError, running
from tests.harness.qemu import CACHE, Qemu, run_img
from tests.harness.qmp_proxy import running_proxy
from tests.harness.shell import ShellError, writing
from tests.harness.vm import Vm, running_vm


async def test_a_paused_vm_answers_qmp_and_refuses_what_is_wrong(paused_vm: Vm) -> None:
    assert (await paused_vm.monitor.execute("query-status"))["status"] == "prelaunch"
    with pytest.raises(QmpError, match="Cannot find device"):
        await paused_vm.monitor.execute(
            "blockdev-snapshot-sync", node_name="no-such-node", snapshot_file="/nonexistent"
        )


async def test_every_kind_of_disk_is_one_the_vm_has(qemu: Qemu, tmp_path: Path) -> None:
    disks = [
        Disk("vda", tmp_path / "vda", MIB, format="qcow2", iothread=True),
        Disk("sda", tmp_path / "sda", MIB, interface="virtio-scsi", throttle=0),
        Disk("sdb", tmp_path / "sdb", MIB, interface="virtio-scsi", iothread=True),
        Disk("hda", tmp_path / "hda", MIB, interface="ide", legacy=True),
        Disk("cd", interface="ide", cdrom=True),
        Disk("ro", tmp_path / "ro", MIB, read_only=True),
        Disk("iso", tmp_path / "iso", MIB, interface="virtio-scsi", cdrom=True, read_only=True),
    ]
    for machine in ("q35", "pc"):
        async with running_vm(qemu, tmp_path, disks, machine=machine, name=machine) as vm:
            blocks = {
                block["qdev"].split("/")[3 if "/" in block["qdev"] else 0]: block
                for block in await vm.monitor.execute("query-block")
            }
            assert set(blocks) == {disk.id for disk in disks}
            assert blocks["sda"]["inserted"]["node-name"] == disks[1].node == "sda-throttle"
            assert blocks["ro"]["inserted"]["ro"]
            assert "inserted" not in blocks["cd"]


async def test_events_are_kept_until_somebody_waits_for_them(paused_vm: Vm) -> None:
    await paused_vm.monitor.execute("cont")
    await paused_vm.monitor.execute("stop")
    await paused_vm.monitor.event("STOP")
    await paused_vm.monitor.event("RESUME")
    assert not paused_vm.monitor.seen("RESUME")


async def test_an_aborting_qemu_fails_a_content_test(qemu: Qemu, tmp_path: Path) -> None:
    with pytest.raises(CrashError, match="SIGABRT"):  # noqa: PT012 - the block is what is tested
        async with running_vm(qemu, tmp_path, []) as vm:
            os.kill(vm.pid, signal.SIGABRT)
            await vm.process.wait()


async def test_a_killed_qemu_is_no_crash(qemu: Qemu, tmp_path: Path) -> None:
    async with running_vm(qemu, tmp_path, []) as vm:
        vm.process.kill()
        assert await vm.process.wait() == -signal.SIGKILL
        with pytest.raises(EOFError):
            await vm.monitor.execute("query-status")


async def test_qemu_that_refuses_its_command_line_says_why(qemu: Qemu, tmp_path: Path) -> None:
    with pytest.raises((EOFError, ConnectionError)) as caught:
        async with running_vm(qemu, tmp_path, [], extra_args=["-device", "no-such-device"]):
            pytest.fail("QEMU started")
    assert "no-such-device" in "".join(caught.value.__notes__)


async def test_qemu_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    parent = tmp_path / "parent.py"
    parent.write_text(
        "import sys, trio\n"
        "from pathlib import Path\n"
        "from tests.harness.process import running\n"
        "async def main():\n"
        "    async with running(['sh', '-c', 'echo $$ > fifo; exec sleep infinity'], Path('log')):\n"
        "        await trio.sleep_forever()\n"
        "trio.run(main)\n"
    )
    root = str(CACHE.parent)
    os.mkfifo(tmp_path / "fifo")
    environment = {**os.environ, "PYTHONPATH": root}
    async with trio.open_nursery() as nursery:
        process = await nursery.start(
            partial(trio.run_process, [sys.executable, parent], env=environment, cwd=tmp_path, check=False)
        )
        child = os.pidfd_open(int(await aside((tmp_path / "fifo").read_text)))
        process.kill()
        with trio.fail_after(10):
            await trio.lowlevel.wait_readable(child)
        os.close(child)


async def test_the_guest_has_a_shell_an_agent_and_file_systems(guest_vm: Vm) -> None:
    assert await guest_vm.shell.run("echo hello") == "hello\n"
    with pytest.raises(ShellError, match="status 3") as caught:
        await guest_vm.shell.run("echo out; echo err >&2; exit 3")
    assert (caught.value.stdout, caught.value.stderr) == ("out\n", "err\n")
    await guest_vm.shell.run("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt && echo content > /mnt/file && sync")
    assert guest_vm.agent is not None
    async with ask(guest_vm.agent) as agent:
        assert (await agent("guest-info"))["version"]
        assert await agent("guest-fsfreeze-freeze") == 1
        assert await agent("guest-fsfreeze-status") == "frozen"
        assert await agent("guest-fsfreeze-thaw") == 1
    await guest_vm.shell.run("fstrim /mnt && umount /mnt && e2fsck -fn /dev/vda")


@pytest.mark.one_qemu
async def test_the_guest_sees_ide_disks_on_machine_pc(qemu: Qemu, tmp_path: Path) -> None:
    disks = [
        Disk("hda", tmp_path / "hda", interface="ide"),
        Disk("sdx", tmp_path / "sdx", 8 * MIB, interface="virtio-scsi"),
    ]
    async with running_vm(qemu, tmp_path, disks, guest=True, machine="pc") as vm:
        assert await vm.shell.run("cat /sys/block/sda/size /sys/block/sdb/size") == "131072\n16384\n"


@pytest.mark.one_qemu
async def test_the_writer_reads_back_what_it_wrote(guest_vm: Vm, tmp_path: Path) -> None:
    assert (await guest_vm.shell.run("writer -n 200 /dev/vda")).startswith('{"writes": 200, "errors": 0,')
    assert count_sectors(tmp_path / "vda.raw", 0) > 200
    with (tmp_path / "vda.raw").open("r+b") as image:  # behind the guest's back: every sector loses its last word
        for offset in range(0, 64 * MIB, 512):
            image.seek(offset + 504)
            image.write(bytes(8))
    with pytest.raises(PatternError, match="torn"):
        count_sectors(tmp_path / "vda.raw", 0)


@pytest.mark.one_qemu
async def test_the_writer_notices_a_disk_that_forgets(guest_vm: Vm, tmp_path: Path) -> None:
    async with writing(guest_vm.shell, "/dev/vda") as writes:
        for _ in range(20):
            await guest_vm.shell.run("usleep 50000")
            os.truncate(tmp_path / "vda.raw", 0)
            os.truncate(tmp_path / "vda.raw", 64 * MIB)
    with pytest.raises(AssertionError, match="misbehaved"):
        writes.check()


@pytest.mark.one_qemu
async def test_ordered_writes_are_a_prefix_at_any_instant_and_the_check_can_fail(guest_vm: Vm, tmp_path: Path) -> None:
    images = [tmp_path / "one.raw", tmp_path / "other.raw"]

    async def copy_disks() -> int:
        await guest_vm.monitor.execute("stop")
        images[0].write_bytes((tmp_path / "vda.raw").read_bytes())
        await run_img(guest_vm.qemu, "convert", "-U", "-O", "raw", tmp_path / "vdb.qcow2", images[1])
        await guest_vm.monitor.execute("cont")
        return last_of_prefix(images)

    async with writing(guest_vm.shell, "-o /dev/vda /dev/vdb") as writes:
        await guest_vm.shell.run("usleep 300000")
        first = await copy_disks()
        older = images[0].read_bytes()
        await guest_vm.shell.run("usleep 300000")
        second = await copy_disks()
    writes.check()
    assert 0 < first < second <= writes.writes
    images[0].write_bytes(older)  # two disks of different instants
    with pytest.raises(PatternError, match="must hold record"):
        last_of_prefix(images)


async def test_the_proxy_passes_descriptors_and_holds_commands(paused_vm: Vm, tmp_path: Path) -> None:
    held, go, replies = trio.Event(), trio.Event(), list[dict[str, Any]]()

    async def on_command(name: str, _: dict[str, Any]) -> None:
        if name == "query-fdsets":
            held.set()
            await go.wait()

    async def on_reply(name: str, arguments: dict[str, Any], reply: dict[str, Any]) -> None:
        replies.append({"name": name, "arguments": arguments, "reply": reply["return"]})

    async with running_proxy(paused_vm.qmp, tmp_path / "proxy.qmp", on_command, on_reply) as proxy:
        for _ in range(2):  # a second client comes after the first
            async with connected(proxy.path) as client:
                with (tmp_path / "file").open("wb") as file:
                    await client.pass_fd(file.fileno())
                    await client.execute("add-fd", fdset_id=7)
        async with connected(proxy.path) as client, trio.open_nursery() as nursery:
            nursery.start_soon(client.execute, "query-fdsets")
            await held.wait()
            assert replies[-1]["name"] == "qmp_capabilities"
            go.set()
    assert proxy.fds == 2
    assert replies[-1]["name"] == "query-fdsets"
    assert [entry["fdset-id"] for entry in replies[-1]["reply"]] == [7]
    assert proxy.names == [
        "qmp_capabilities",
        "add-fd",
        "qmp_capabilities",
        "add-fd",
        "qmp_capabilities",
        "query-fdsets",
    ]


async def test_nbd_servers_serve(qemu: Qemu, tmp_path: Path) -> None:
    image = make_random(tmp_path / "image", MIB)
    certificates = make_certificates(tmp_path / "pki")
    blockdev = ["--blockdev", f"file,node-name=f,filename={image}", "--export", "nbd,id=e,node-name=f,name=disk"]
    async with (
        qemu_nbd(qemu, tmp_path, image) as plain,
        qemu_nbd(qemu, tmp_path, image, certificates=certificates, tcp=True, name="tls") as secure,
        nbdkit(tmp_path, ["memory", "1M"], certificates=certificates, tcp=True) as kit,
        storage_daemon(qemu, tmp_path, blockdev) as daemon,
    ):
        for uri in (plain.uri, secure.uri, kit.uri, daemon.export("disk")):
            assert (await trio.run_process(["nbdinfo", "--size", uri], capture_stdout=True)).stdout == b"1048576\n"


async def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(CrashError, match="no-such-plugin"):
        async with nbdkit(tmp_path, ["no-such-plugin"]):
            pytest.fail("nbdkit started")


async def test_a_failing_process_fails_the_test(tmp_path: Path) -> None:
    with pytest.raises(CrashError, match="exited with status 3:\noops"):
        async with running(["sh", "-c", "echo oops; exit 3"], tmp_path / "log") as process:
            await process.wait()


def test_files_are_compared_to_the_byte(tmp_path: Path) -> None:
    left, right = make_random(tmp_path / "left", 9 * MIB, hole_every=2), tmp_path / "right"
    assert data_extents(left)[:2] == [(0, 65536), (131072, 65536)]
    assert 0 < allocated(left) < 9 * MIB
    right.write_bytes(left.read_bytes())
    assert_same(left, right)
    with right.open("r+b") as file:
        file.seek(5 * MIB + 77)
        file.write(bytes([left.read_bytes()[5 * MIB + 77] ^ 1]))
    assert first_difference(left, right) == 5 * MIB + 77
    os.truncate(right, MIB)
    with pytest.raises(AssertionError, match=f"from byte {MIB}"):
        assert_same(left, right)
