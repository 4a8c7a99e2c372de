# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the log says: a line for each step of a mount's life, in the form that systemd reads; more with -v; on SIGUSR1
where every task stands."""

import fcntl
import os
import re
import signal
from pathlib import Path

import pytest
import trio

from tests.e2e.support import idle_vm, left_as_it_was
from tests.faults.support import unmounted, until
from tests.harness.mount import PROGRAM, Mount, aside, mounted, mounting
from tests.harness.qemu import Qemu
from tests.harness.qmp_proxy import running_proxy

pytestmark = pytest.mark.one_qemu


async def test_systemd_gets_a_line_with_its_level_for_each_step(qemu: Qemu, tmp_path: Path) -> None:
    log = tmp_path / "mnt-mount.log"
    log.touch()
    stream = f"JOURNAL_STREAM={log.stat().st_dev}:{log.stat().st_ino}"
    async with idle_vm(qemu, tmp_path) as vm:
        options = f"fleece={tmp_path},agent={tmp_path}/none,target=nas,state={tmp_path}"
        line: list[str | Path] = [
            "env",
            stream,
            PROGRAM,
            "mount",
            "--foreground",
            vm.qmp,
            tmp_path / "mnt",
            "-o",
            options,
        ]
        async with mounting(line, tmp_path / "mnt") as process:
            await aside((tmp_path / "mnt/.qfsbackup/control").write_text, "commit\n")
            await unmounted(tmp_path / "mnt")
            await process.wait()
            lines = process.log.splitlines()
    steps = [
        "<4>the snapshot is taken without freezing",
        "<6>took a snapshot of .*: vda .*, vdb .*; file systems not frozen, guest paused .* ms",
        "<6>mounted .* at .*",
        "<6>committed to target nas: vda .*",
        "<6>unmounted .*",
        "<6>QEMU is as it was",
    ]
    assert len(lines) == len(steps), lines
    assert all(re.match(step, line) for step, line in zip(steps, lines, strict=True)), lines


async def test_verbose_says_every_qmp_command(qemu: Qemu, tmp_path: Path) -> None:
    async with (
        idle_vm(qemu, tmp_path) as vm,
        running_proxy(vm.qmp, tmp_path / "proxy") as proxy,
        mounted(proxy.path, tmp_path / "mnt", f"fleece={tmp_path}") as mount,
    ):
        await unmounted(mount.path)
        await mount.process.wait()
        said = re.findall(r"^QMP: ([a-z-]+) \{", mount.process.log, re.MULTILINE)
        assert said == [name for name in proxy.names if name != "qmp_capabilities"]
        assert "blockdev-add" in said


async def test_sigusr1_says_where_every_task_stands(qemu: Qemu, tmp_path: Path) -> None:
    async with idle_vm(qemu, tmp_path) as vm, mounted(vm.qmp, tmp_path / "mnt", f"fleece={tmp_path}") as mount:
        os.kill(mount.process.pid, signal.SIGUSR1)  # the supervisor hands it on

        async def said() -> bool:
            return "task " in mount.process.log

        await until(said)
        for task in ("watch_fleecing", "_serve", "receive", "_probe"):
            assert re.search(rf"task .*{task}", mount.process.log), task
        assert (await mount.status())["state"] == "ready"


async def test_a_log_that_nobody_reads_holds_nobody_up(qemu: Qemu, tmp_path: Path) -> None:
    """What -v says is more than its pipe takes."""
    fifo, mountpoint = tmp_path / "fifo", tmp_path / "mnt"
    os.mkfifo(fifo)
    pipe = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096)
    try:
        async with idle_vm(qemu, tmp_path) as vm, left_as_it_was(vm):
            command = f"exec {PROGRAM} mount --foreground -v {vm.qmp} {mountpoint} -o fleece={tmp_path} 2> {fifo}"
            async with mounting(["sh", "-c", command], mountpoint) as process:
                assert (await Mount(mountpoint, process).status())["state"] == "ready"
                process.terminate()
                with trio.fail_after(20):
                    assert await process.wait() == 0
        assert len(os.read(pipe, 4096)) > 2048
    finally:
        os.close(pipe)
