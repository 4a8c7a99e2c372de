# SPDX-License-Identifier: LGPL-2.1-or-later
"""SIGKILL after each QMP command that changes something, from the first one of a mount over its commit to its end.

    proxy:  command n arrives -> kill -> command n reaches QEMU, its answer nobody

Who dies, and who puts the VM back: the worker (the supervisor does it), the supervisor (the worker does it), both (the
next mount, or `qfsbackup cleanup`). FAULTS=all kills after the commands that only look, too.
"""

import contextlib
import errno
import os
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import trio

from qfsbackup.state.store import open_store
from qfsbackup.vm.bitmaps.checkpoint import bitmap_name, low_name
from qfsbackup.vm.ours import OWNER, PREFIX
from tests.e2e.support import idle_vm
from tests.faults.support import Mounter, answers, ended, kill_at_once, looks, mounter, parent, unmounted
from tests.harness.mount import aside, is_mounted, qfsbackup
from tests.harness.qemu import Qemu
from tests.harness.qmp_proxy import running_proxy
from tests.harness.vm import UUID, Vm
from tests.vm.support import guest_io, held, server_runs

Victim = Literal["worker", "supervisor", "both"]
EVERY_COMMAND = os.environ.get("FAULTS") == "all"


class Killer:
    """A hook for the QMP proxy. `number` is the command to kill at, counted from the mark of the mount's owner."""

    def __init__(self, victim: Victim) -> None:
        self._victim = victim
        self._passed = 0
        self.number = 0
        self.worker = self.supervisor = 0
        self.killed_at: str | None = None

    def arm(self, number: int) -> None:
        """Wait for the next mount."""
        self.number, self.worker, self.killed_at = number, 0, None

    async def __call__(self, name: str, arguments: dict[str, Any]) -> None:
        node = str(arguments.get("node-name", ""))
        if name == "blockdev-add" and node.startswith(OWNER):
            self.worker = int(node.removeprefix(OWNER).split("-")[0], 16)
            self.supervisor, self._passed = parent(self.worker), 0
        if not self.worker or self.killed_at or (looks(name) and not EVERY_COMMAND):
            return
        self._passed += 1
        if self._passed > self.number:
            self.killed_at = name
            victims = {"worker": [self.worker], "supervisor": [self.supervisor], "both": [self.worker, self.supervisor]}
            async with ended(victims[self._victim]):
                kill_at_once(victims[self._victim])


async def mount_commit_unmount(vm: Vm, killer: Killer, mounting: Mounter, socket: Path, mountpoint: Path) -> None:
    """As far as it gets; then wait for the end of all its processes."""
    folder = mountpoint.parent
    error = await mounting.mount(socket, mountpoint, f"fleece={folder},target=nas,vm=web1,state={folder}")
    assert error is None or killer.killed_at, error
    if killer.killed_at:
        return
    await guest_io(vm, "vda", "write -P 7 1M 256k")
    async with ended([killer.worker, killer.supervisor]):
        with contextlib.suppress(OSError):  # the kill
            await aside((mountpoint / ".qfsbackup/control").write_text, "commit\n")
        await unmounted(mountpoint)


def without_checkpoints(state: dict[str, Any]) -> dict[str, Any]:
    """What `held` returned, but for the bitmaps."""
    return {name: value for name, value in state.items() if name != "bitmaps"}


async def checkpoint(vm: Vm, folder: Path) -> tuple[str, ...]:
    """The committed generations; their bitmaps, and no others of ours, must be in QEMU."""
    with open_store(folder, UUID, "web1") as store:
        bases = store.bases("nas")
    nodes = await vm.monitor.execute("query-named-block-nodes", flat=True)
    found = {
        (node["node-name"], bitmap["name"])
        for node in nodes
        for bitmap in node.get("dirty-bitmaps", ())
        if bitmap.get("name", "").startswith(PREFIX)
    }
    expected = {(f"{disk}-node", bitmap_name("nas", base.generation)) for disk, base in bases.items()}
    assert found == expected | {(node, low_name(name)) for node, name in expected}
    return tuple(sorted(base.generation for base in bases.values()))


async def kill_after_each(qemu: Qemu, folder: Path, victim: Victim) -> None:
    """Mount, commit and unmount one VM until nothing is left to be killed at."""
    killer, mountpoint = Killer(victim), folder / "mnt"
    done, generations = list[str](), set[tuple[str, ...]]()
    async with (
        idle_vm(qemu, folder) as vm,
        running_proxy(vm.qmp, folder / "proxy", killer) as proxy,
        mounter(mountpoint) as mounting,
    ):
        before = without_checkpoints(await held(vm))
        while True:
            killer.arm(len(done))
            await mount_commit_unmount(vm, killer, mounting, proxy.path, mountpoint)
            if killer.killed_at is None:
                break
            done.append(killer.killed_at)
            where = f"{victim} killed after {killer.killed_at}, the {len(done)}th command"
            if victim == "both" and len(done) % 2:
                assert await answers(mountpoint) in (None, errno.ENOTCONN), where
                continue  # the next mount finds it
            if victim == "both":
                options = f"target=nas,vm=web1,state={folder}"
                assert (await qfsbackup("cleanup", proxy.path, "-o", options)).code == 0, where
            assert without_checkpoints(await held(vm)) == before, where
            assert not is_mounted(mountpoint), where
            generations.add(await checkpoint(vm, folder))
            await guest_io(vm, "vda", "write -P 8 1M 256k")
            await guest_io(vm, "vdb", "write -P 8 0 64k")
        assert without_checkpoints(await held(vm)) == before
        generations.add(await checkpoint(vm, folder))
        assert not await server_runs(vm)
    assert len(done) > 25, done
    assert len(generations) > 3, generations


@pytest.mark.timeout(600)
async def test_a_kill_after_any_command_leaves_nothing(qemu: Qemu, tmp_path: Path) -> None:
    """Three VMs at once, one for each victim."""
    async with trio.open_nursery() as nursery:
        for victim in get_args(Victim):
            folder = tmp_path / victim
            folder.mkdir()
            nursery.start_soon(kill_after_each, qemu, folder, victim)
