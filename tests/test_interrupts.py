# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ctrl-C, as a terminal sends it, to the whole process group: one line, exit status 130, and nothing is left."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.support import left_as_it_was
from tests.faults.support import ended, until
from tests.harness.mount import PROGRAM, Result, aside, command, is_mounted, mounted, qfsbackup, taken_away
from tests.harness.qmp_proxy import running_proxy
from tests.harness.vm import Vm
from tests.vm.support import guest_io

CALLED_OFF = "interrupted: nothing is mounted, and the VM is as it was"
MOUNT: list[str | Path] = [PROGRAM, "mount", "$QMP", "$MNT"]
RUN: list[str | Path] = [PROGRAM, "run", "$QMP", "--mountpoint", "$MNT", "--", "true"]

# the words of a command, the QMP command that is on its way when Ctrl-C is pressed, and the line
MOMENTS: list[tuple[list[str | Path], str, str]] = [
    (MOUNT, "qmp_capabilities", CALLED_OFF),
    (MOUNT, "blockdev-add", CALLED_OFF),
    (MOUNT, "qom-set", CALLED_OFF),
    (MOUNT, "block-export-add", CALLED_OFF),
    ([PROGRAM.with_name("mount.qfsbackup"), "$QMP", "$MNT"], "qom-set", CALLED_OFF),
    ([*MOUNT, "--foreground"], "qom-set", CALLED_OFF),
    (RUN, "qom-set", CALLED_OFF),
    (RUN, "nbd-server-stop", "interrupted: the command had ended already, with status 0"),
    ([PROGRAM, "cleanup", "$QMP"], "query-named-block-nodes", "interrupted"),
    ([PROGRAM, "checkpoints", "$QMP"], "query-named-block-nodes", "interrupted"),
]


class Pressed:
    """A command in a process group of its own, as a shell makes one, and Ctrl-C."""

    def __init__(self, words: list[str | Path], **options: Any) -> None:
        self._process = subprocess.Popen(
            words, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
        )

    def press(self) -> None:
        os.killpg(self._process.pid, signal.SIGINT)

    def signal(self, number: signal.Signals) -> None:
        """To the command alone."""
        self._process.send_signal(number)

    async def end(self) -> Result:
        out, err = await aside(self._process.communicate)
        return Result(self._process.returncode, out, err)


@pytest.mark.one_qemu
@pytest.mark.parametrize(("words", "at", "line"), MOMENTS, ids=[f"{one[0][1]}-{one[1]}" for one in MOMENTS])
async def test_ctrl_c_leaves_nothing(
    vm: Vm, directory: Path, tmp_path: Path, words: list[str | Path], at: str, line: str
) -> None:
    running: list[Pressed] = []
    places = {"$QMP": tmp_path / "proxy.qmp", "$MNT": directory}

    async def press(name: str, _arguments: object) -> None:
        if name == at and running:
            running.pop().press()

    async with (
        left_as_it_was(vm),
        running_proxy(vm.qmp, places["$QMP"], on_command=press),
        taken_away(directory, places["$QMP"]),
    ):
        command = Pressed([places.get(str(word), word) for word in words])
        running.append(command)
        done = await command.end()
        assert not running, "it did not get that far"
        assert (done.code, done.stderr.splitlines()[-1]) == (130, line), done
        if line == CALLED_OFF:
            assert done.stderr == f"{line}\n"
        assert not is_mounted(directory)


@pytest.mark.one_qemu
async def test_ctrl_c_while_the_command_of_run_works_is_for_the_command(vm: Vm, directory: Path) -> None:
    """It comes from the command here; to the whole process group, as from a terminal."""
    async with left_as_it_was(vm), taken_away(directory, vm.qmp):
        words = ["sh", "-c", "kill -INT 0; sleep 600"]
        done = await Pressed([PROGRAM, "run", vm.qmp, "--mountpoint", directory, "--", *words]).end()
        assert (done.code, "the command ended with status 130 (SIGINT)" in done.stderr) == (130, True), done
        assert not is_mounted(directory)


@pytest.mark.one_qemu
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_another_end_of_the_command_that_waits_for_a_mount_leaves_nothing_either(
    vm: Vm, directory: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """timeout(1), or a terminal that closes."""
    proxy = tmp_path / "proxy.qmp"
    running: list[Pressed] = []

    async def end(name: str, _arguments: object) -> None:
        if name == "qom-set" and running:
            running.pop().signal(number)

    async with left_as_it_was(vm), running_proxy(vm.qmp, proxy, on_command=end), taken_away(directory, proxy):
        running.append(mount := Pressed([PROGRAM, "mount", proxy, directory]))
        line = f"interrupted: {number.name}: nothing is mounted, and the VM is as it was\n"
        assert await mount.end() == Result(128 + number, "", line)
        assert not is_mounted(directory)


@pytest.mark.one_qemu
async def test_ctrl_c_at_an_unmount_says_what_goes_on(vm: Vm, directory: Path, tmp_path: Path) -> None:
    proxy = tmp_path / "proxy.qmp"
    running: list[Pressed] = []

    async def press(name: str, _arguments: object) -> None:
        if name == "nbd-server-stop":
            running.pop().press()

    async with left_as_it_was(vm), running_proxy(vm.qmp, proxy, on_command=press), taken_away(directory, proxy):
        assert (await qfsbackup("mount", proxy, directory)).code == 0
        [status] = json.loads((await qfsbackup("status", directory, "--json")).stdout)
        async with ended([status["ppid"]]):
            umount = Pressed([PROGRAM, "umount", directory])
            running.append(umount)
            line = f"interrupted: unmounted; process {status['ppid']} goes on putting the VM back as it was\n"
            assert await umount.end() == Result(130, "", line)


async def test_ctrl_c_while_modules_are_loaded_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "argparse.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
    )
    done = await qfsbackup("status", environment={"PYTHONPATH": str(tmp_path)})
    assert done == Result(130, "", "interrupted\n")


async def test_ctrl_c_before_python_is_there_waits_for_it() -> None:
    """As the commands that `./run` makes start us; else Python itself would print a traceback, and not with 130."""
    words: list[str | Path] = [
        "env",
        "--block-signal=INT",
        "sh",
        "-c",
        'kill -INT $$; exec "$@"',
        "sh",
        PROGRAM,
        "status",
    ]
    assert await command(*words) == Result(130, "", "interrupted\n")


@pytest.mark.one_qemu
@pytest.mark.parametrize("image", ["vda.raw", "vda.qcow2"])
async def test_ctrl_c_takes_a_half_restored_image_away(vm: Vm, directory: Path, tmp_path: Path, image: str) -> None:
    """From a mount that gives its bytes slowly."""
    await guest_io(vm, "vda", "write -P 5 0 4M")
    output = tmp_path / "restored"
    output.mkdir()
    async with mounted(vm.qmp, directory, "bwlimit=1M,disks=vda"):
        restore = Pressed([PROGRAM, "restore", directory / "chunks/vda", output / image])

        async def begun() -> bool:
            return bool(await aside(os.listdir, output))

        await until(begun)
        restore.press()
        assert await restore.end() == Result(130, "", "interrupted\n")
        assert await aside(os.listdir, output) == []
