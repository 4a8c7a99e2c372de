# SPDX-License-Identifier: LGPL-2.1-or-later
"""`qfsbackup run`: the command, its signals and status, and what is left of the mount."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import termios
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.support import left_as_it_was
from tests.faults.support import ended
from tests.harness.mount import (
    PROGRAM,
    Result,
    aside,
    is_mounted,
    qfsbackup,
    start,
    taken_away,
)
from tests.harness.vm import Vm

# ---- run ----


async def run_in_mount(vm: Vm, directory: Path, *words: str | Path, **options: Any) -> Result:
    return await qfsbackup("run", vm.qmp, "--mountpoint", directory, "--", *words, **options)


@pytest.mark.one_qemu
async def test_run_gives_the_command_the_mount_and_passes_its_status_on(vm: Vm, directory: Path) -> None:
    async with left_as_it_was(vm):
        script = "pwd; echo $QFSBACKUP_MOUNT; ls -d images vm.json; cat images/vda.raw | wc -c; echo told >&2; exit 7"
        done = await run_in_mount(vm, directory, "sh", "-c", script)
        assert done.code == 7
        assert done.stdout.split() == [str(directory)] * 2 + ["images", "vm.json", str(4 << 20)]
        assert "told\n" in done.stderr
        assert re.search(r"2 disks, 8 MiB dirty, 4 MiB read, fleecing .*, guest paused [0-9.]+ ms, ", done.stderr)
        assert not is_mounted(directory)
    assert (await run_in_mount(vm, directory, "true")).code == 0
    assert (await run_in_mount(vm, directory, "sh", "-c", "kill -USR1 $$")).code == 128 + signal.SIGUSR1


@pytest.mark.one_qemu
async def test_run_uses_the_same_mountpoint_each_time(vm: Vm) -> None:
    """Backup tools know a file by its path."""
    first = await qfsbackup("run", vm.qmp, "--", "pwd")
    second = await qfsbackup("run", vm.qmp.name, "--", "pwd", cwd=vm.qmp.parent)
    assert first.stdout == second.stdout
    assert first.stdout.startswith("/run/qfsbackup/mnt/")


@pytest.mark.one_qemu
async def test_our_own_failure_is_125(vm: Vm, directory: Path, tmp_path: Path) -> None:
    (await qfsbackup("run", tmp_path / "missing.qmp", "--", "true")).refused(125, "missing.qmp")
    async with left_as_it_was(vm):
        done = await run_in_mount(vm, directory, "no-such-program")
        assert done.code == 125
        assert "cannot run no-such-program" in done.stderr
        assert "took a snapshot" not in done.stderr
        assert not is_mounted(directory)


@pytest.mark.one_qemu
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_goes_to_the_command_which_may_end_in_order(
    vm: Vm, directory: Path, tmp_path: Path, number: signal.Signals
) -> None:
    os.mkfifo(tmp_path / "fifo")
    script = f"trap 'kill $!; exit 9' TERM HUP; sleep 600 & echo ready > {tmp_path / 'fifo'}; wait"
    async with left_as_it_was(vm), taken_away(directory, vm.qmp):
        run = start(
            PROGRAM, "run", vm.qmp, "--mountpoint", directory, "--", "sh", "-c", script, stderr=subprocess.DEVNULL
        )
        with run:
            assert await aside((tmp_path / "fifo").read_text) == "ready\n"
            run.send_signal(number)
            assert await aside(run.wait) == 9
        assert not is_mounted(directory)


@pytest.mark.one_qemu
async def test_a_command_that_leaves_a_process_behind_does_not_keep_the_mount(vm: Vm, directory: Path) -> None:
    async with left_as_it_was(vm):
        script = "sleep 600 < images/vda.raw > /dev/null 2>&1 & echo $!"
        done = await run_in_mount(vm, directory, "sh", "-c", script)
        os.kill(int(done.stdout), signal.SIGKILL)
        assert (done.code, "still in use" in done.stderr) == (0, True), done
        assert not is_mounted(directory)


@pytest.mark.one_qemu
async def test_a_killed_run_gives_the_vm_back_and_takes_all_that_its_command_started_along(
    vm: Vm, directory: Path, tmp_path: Path
) -> None:
    """A grandchild, and one that left the session and its parent."""
    os.mkfifo(tmp_path / "fifo")
    async with left_as_it_was(vm), taken_away(directory, vm.qmp):
        script = f"sleep 601 & setsid -f sh -c 'echo $$; exec sleep 602 > /dev/null' > {tmp_path / 'fifo'}; wait; true"
        with start(PROGRAM, "run", vm.qmp, "--mountpoint", directory, "--", "sh", "-c", script) as run:
            left = int(await aside((tmp_path / "fifo").read_text))
            [status] = json.loads((await qfsbackup("status", directory, "--json")).stdout)
            async with ended([status["ppid"], left, *children(keeper(run.pid))]):
                run.kill()
        assert not is_mounted(directory)


@pytest.mark.one_qemu
async def test_a_command_does_not_outlive_its_keeper(vm: Vm, directory: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    async with left_as_it_was(vm), taken_away(directory, vm.qmp):
        script = f"echo $$ > {tmp_path / 'fifo'}; exec sleep 603 > /dev/null"
        with start(PROGRAM, "run", vm.qmp, "--mountpoint", directory, "--", "sh", "-c", script, stderr=-3) as run:
            async with ended([int(await aside((tmp_path / "fifo").read_text))]):
                os.kill(keeper(run.pid), signal.SIGKILL)
            assert await aside(run.wait) == 128 + signal.SIGKILL
        assert not is_mounted(directory)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def keeper(run: int) -> int:
    """The child of `run` that has the command; the other one, the mount's supervisor, has left the session."""
    [found] = [pid for pid in children(run) if os.getsid(pid) == os.getsid(run)]
    return found


@pytest.mark.one_qemu
async def test_run_draws_a_bar_on_a_terminal(vm: Vm, directory: Path) -> None:
    main, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    try:
        words = ("cat", "images/vda.raw", "images/vdb.raw")
        with start(
            PROGRAM,
            "run",
            vm.qmp,
            "--mountpoint",
            directory,
            "--",
            *words,
            stdin=terminal,
            stdout=subprocess.DEVNULL,
            stderr=terminal,
            env={**os.environ, "TERM": "xterm"},
        ) as run:
            os.close(terminal)
            shown = await aside(read_all, main)
            assert await aside(run.wait) == 0, shown
    finally:
        os.close(main)
    assert re.search(r"\rread +\d+%\|.*\| 8\.00MB of 8\.00MB, .*B/s, fleecing \d", shown), shown


def read_all(terminal: int) -> str:
    parts = []
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while part := os.read(terminal, 65536):
            parts.append(part)
    return b"".join(parts).decode(errors="replace")
