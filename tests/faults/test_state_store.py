# SPDX-License-Identifier: LGPL-2.1-or-later
"""The state cannot be had, because its store hangs or another process locks it: the mount answers, and can be ended."""

import errno
import fcntl
from pathlib import Path

import pytest
import trio

from tests.e2e.support import idle_vm, left_as_it_was
from tests.faults.stores import WAITS_FOR_STORE, hanging_store, waits_in
from tests.faults.support import nothing_of_ours, reads, until
from tests.harness.mount import PROGRAM, aside, mounted, processes_of, taken_away
from tests.harness.process import running
from tests.harness.qemu import Qemu

pytestmark = pytest.mark.one_qemu


async def any_waits_in(mountpoint: Path, function: str) -> None:
    """Until a process that mounts something there waits in this function of the kernel."""

    async def waits() -> bool:
        return any(waits_in(pid, function) for pid in processes_of(mountpoint))

    await until(waits)


async def test_a_store_that_hangs_holds_up_the_commit_and_nothing_else(qemu: Qemu, tmp_path: Path) -> None:
    errors = []
    async with hanging_store(tmp_path) as store, idle_vm(qemu, tmp_path) as vm, left_as_it_was(vm):
        (store.path / "state").mkdir(mode=0o700)
        options = f"fleece={tmp_path},target=nas,state={store.path}/state"
        async with mounted(vm.qmp, tmp_path / "mnt", options) as mount, trio.open_nursery() as nursery:
            store.stop()

            async def commit() -> None:
                try:
                    await aside((mount.path / ".qfsbackup/control").write_text, "commit\n")
                except OSError as error:
                    errors.append(error.errno)

            nursery.start_soon(commit)
            await any_waits_in(mount.path, WAITS_FOR_STORE)
            assert (await mount.status())["state"] == "ready"
            assert len(await reads(mount.image("vda"))) == vm.disks[0].size
            mount.process.terminate()
            with trio.fail_after(
                25
            ):  # 5 s for the commit, 5 s for the store to be closed, and what a busy machine adds
                assert await mount.process.wait() == 0
        await nothing_of_ours(vm)
    assert errors == [errno.ECONNABORTED] or errors == [errno.ENOTCONN], errors


async def test_who_waits_for_a_lock_on_the_state_can_be_ended(qemu: Qemu, tmp_path: Path) -> None:
    state, mountpoint = tmp_path / "state", tmp_path / "mnt"
    state.mkdir(mode=0o700)
    async with idle_vm(qemu, tmp_path) as vm, left_as_it_was(vm), taken_away(mountpoint):
        options = f"fleece={tmp_path},target=nas,state={state}"
        async with mounted(vm.qmp, mountpoint, options):
            pass
        [lock] = state.glob("*.sqlite.lock")
        line: list[str | Path] = [PROGRAM, "mount", "--foreground", vm.qmp, mountpoint, "-o", options]
        with lock.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            async with running(line, tmp_path / "mount.log") as process:
                await any_waits_in(mountpoint, "lock_inode_wait")
                process.terminate()
                with trio.fail_after(25):
                    assert await process.wait() == 0
