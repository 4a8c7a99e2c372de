# SPDX-License-Identifier: LGPL-2.1-or-later
"""However a mount ends, QEMU has exactly what it had before, the VM runs, and nothing of ours is left."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.support import idle_vm, left_as_it_was, overwrite, runtime_folder
from tests.harness.mount import DONE, aside, command, ending, is_mounted, mounted, qfsbackup, start
from tests.harness.qemu import Qemu
from tests.harness.vm import Vm

KILLED = 128 + signal.SIGKILL


@dataclass(frozen=True)
class Mounted:
    """A mount in the background, or in the foreground; `runtime` is its folder under /run."""

    path: Path
    supervisor: int
    worker: int
    runtime: Path


@contextlib.asynccontextmanager
async def in_use(vm: Vm, path: Path, *, foreground: bool = False, code: int = 0) -> AsyncIterator[Mounted]:
    """A mount whose fleecing files hold something. The block ends it; then nothing of it may be left but, of a killed
    one, what `qfsbackup cleanup` is for. `code` is the exit status of the foreground process."""
    async with contextlib.AsyncExitStack() as stack:
        if foreground:
            await stack.enter_async_context(mounted(vm.qmp, path, expected=(code, -code)))
        else:
            if not is_mounted(path):  # else it is a dead one
                path.mkdir(exist_ok=True)  # noqa: ASYNC240 - nothing is mounted there
            done = await qfsbackup("mount", vm.qmp, path)
            assert (done.code, done.stdout) == (0, ""), done
        status = json.loads(await aside((path / ".qfsbackup/status.json").read_text))
        await overwrite(vm)
        async with ending(status["ppid"]), ending(status["pid"]):
            yield Mounted(path, status["ppid"], status["pid"], runtime_folder(vm))


async def by_umount(mount: Mounted) -> None:
    assert await command("umount", mount.path) == DONE


async def by_our_umount(mount: Mounted) -> None:
    """It returns when all is done: the processes are gone already."""
    assert await qfsbackup("umount", mount.path) == DONE
    assert not Path(f"/proc/{mount.worker}").exists()  # noqa: ASYNC240 - procfs


async def by_signal(to: str, number: signal.Signals, mount: Mounted) -> None:
    os.kill(getattr(mount, to), number)


ENDS: dict[str, Callable[[Mounted], Awaitable[None]]] = {
    "umount(8)": by_umount,
    "qfsbackup umount": by_our_umount,
    "SIGTERM to the supervisor": partial(by_signal, "supervisor", signal.SIGTERM),
    "SIGINT to the supervisor": partial(by_signal, "supervisor", signal.SIGINT),
    "SIGTERM to the worker": partial(by_signal, "worker", signal.SIGTERM),
    "SIGINT to the worker": partial(by_signal, "worker", signal.SIGINT),
    "SIGKILL to the supervisor": partial(by_signal, "supervisor", signal.SIGKILL),
}


def assert_nothing_left(mount: Mounted) -> None:
    """Neither the mount nor its folder with the NBD socket."""
    assert not is_mounted(mount.path)
    assert not mount.runtime.exists()


@pytest.mark.one_qemu
@pytest.mark.parametrize("foreground", [False, True], ids=["background", "foreground"])
@pytest.mark.parametrize("end", ENDS)
async def test_every_end_leaves_all_as_it_was(qemu: Qemu, tmp_path: Path, end: str, foreground: bool) -> None:
    code = signal.SIGKILL if end.startswith("SIGKILL") and foreground else 0
    async with idle_vm(qemu, tmp_path) as vm, left_as_it_was(vm):
        async with in_use(vm, tmp_path / "mnt", foreground=foreground, code=code) as mount:
            await ENDS[end](mount)
        assert_nothing_left(mount)


async def test_every_qemu_is_left_as_it_was_and_can_be_mounted_again(qemu: Qemu, tmp_path: Path) -> None:
    async with idle_vm(qemu, tmp_path) as vm, left_as_it_was(vm):
        for _ in range(3):
            async with in_use(vm, tmp_path / "mnt") as mount:
                await by_umount(mount)
            assert_nothing_left(mount)


@pytest.mark.one_qemu
async def test_a_busy_mount_is_not_unmounted_and_a_lazy_one_ends(qemu: Qemu, tmp_path: Path) -> None:
    async with idle_vm(qemu, tmp_path) as vm, left_as_it_was(vm), in_use(vm, tmp_path / "mnt") as mount:
        with start("sleep", "infinity", cwd=mount.path, stdout=subprocess.DEVNULL) as user:
            try:
                (await qfsbackup("umount", mount.path)).refused(32, "busy")
                assert (await aside((mount.path / "images/vda.raw").stat)).st_size
                assert await command("umount", "-l", mount.path) == DONE
            finally:
                user.kill()


async def test_the_supervisor_of_a_killed_worker_restores_the_vm(qemu: Qemu, tmp_path: Path) -> None:
    async with idle_vm(qemu, tmp_path) as vm, left_as_it_was(vm):
        async with in_use(vm, tmp_path / "mnt", foreground=True, code=KILLED) as mount:
            os.kill(mount.worker, signal.SIGKILL)
        assert_nothing_left(mount)


async def kill_both(mount: Mounted) -> None:
    """At one instant, as the OOM killer or a power cut of the container does it: neither sees the other die."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in (mount.supervisor, mount.worker):
            os.kill(pid, number)


@pytest.mark.one_qemu
async def test_cleanup_undoes_what_killed_processes_left_and_can_be_repeated(qemu: Qemu, tmp_path: Path) -> None:
    async with idle_vm(qemu, tmp_path) as vm, left_as_it_was(vm):
        async with in_use(vm, tmp_path / "mnt") as mount:
            await kill_both(mount)
        assert is_mounted(mount.path)
        dead = await qfsbackup("status", mount.path)
        assert (dead.code, " dead\n" in dead.stdout, f"qfsbackup cleanup {vm.qmp}" in dead.stdout) == (0, True, True)
        done = await qfsbackup("cleanup", vm.qmp)
        assert (done.code, done.stderr) == (0, "")
        assert done.stdout.splitlines()[0] == f"detached the dead mount at {mount.path}"
        assert "qfsbackup-filter-0" in done.stdout
        assert_nothing_left(mount)
        assert await qfsbackup("cleanup", vm.qmp) == DONE


@pytest.mark.one_qemu
async def test_umount_takes_a_dead_mount_away_and_says_what_is_left_to_do(qemu: Qemu, tmp_path: Path) -> None:
    async with idle_vm(qemu, tmp_path) as vm, left_as_it_was(vm):
        async with in_use(vm, tmp_path / "mnt") as mount:
            await kill_both(mount)
        (await qfsbackup("umount", mount.path)).refused(2, "was dead")
        assert not is_mounted(mount.path)
        assert (await qfsbackup("cleanup", vm.qmp)).code == 0


async def test_the_next_mount_undoes_what_killed_processes_left(qemu: Qemu, tmp_path: Path) -> None:
    async with idle_vm(qemu, tmp_path) as vm, left_as_it_was(vm):
        async with in_use(vm, tmp_path / "mnt") as mount:
            await kill_both(mount)
        async with in_use(vm, tmp_path / "mnt") as again:
            assert again.runtime != mount.runtime
            await by_umount(again)
        assert_nothing_left(again)
        assert not mount.runtime.exists()


@pytest.mark.one_qemu
async def test_a_living_mount_is_not_cleaned_up(qemu: Qemu, tmp_path: Path) -> None:
    async with idle_vm(qemu, tmp_path) as vm, left_as_it_was(vm), in_use(vm, tmp_path / "mnt") as mount:
        busy = await qfsbackup("cleanup", vm.qmp)
        assert busy.code == 32, busy
        assert (await aside((mount.path / "images/vda.raw").stat)).st_size
        await by_umount(mount)
