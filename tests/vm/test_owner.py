# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who owns the snapshot in a VM, and whether he lives, also where his process id means nothing here."""

import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from qfsbackup.errors import UserError
from qfsbackup.vm.ours import OWNER
from tests.harness.disk import MIB, Disk
from tests.harness.mount import PROGRAM, command
from tests.harness.qemu import Qemu
from tests.harness.qmp_proxy import running_proxy
from tests.harness.vm import Vm, running_vm
from tests.vm.support import held, make_source
from tests.vm.test_cleanup import clean

CONTAINER = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


@pytest.fixture
async def vm(qemu: Qemu, tmp_path: Path) -> AsyncIterator[Vm]:
    """With a second QMP socket, for a mount holds the first one."""
    second = ["-qmp", f"unix:{tmp_path / 'second'},server=on,wait=off"]
    async with running_vm(qemu, tmp_path, [Disk("vda", tmp_path / "vda.raw", MIB)], extra_args=second) as vm:
        yield vm


@contextlib.asynccontextmanager
async def mount_in(prefix: list[str], vm: Vm, folder: Path) -> AsyncIterator[trio.Process]:
    """A snapshot in a process of its own; after the block that process has ended, killed."""
    line = [*prefix, sys.executable, "-m", "tests.vm.killed_mount", str(vm.qmp), str(folder)]
    process = await trio.lowlevel.open_process(line, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert (await process.stdout.receive_some()).startswith(b"ready")
        yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            while await process.stdout.receive_some():
                pass  # until the child of unshare is gone as well


async def test_a_snapshot_of_another_pid_namespace_is_left_alone_as_long_as_its_owner_lives(
    vm: Vm, tmp_path: Path
) -> None:
    before = await held(vm)
    async with mount_in(CONTAINER, vm, tmp_path):
        during = await held(vm)
        with pytest.raises(UserError, match="in another PID namespace") as caught:
            async with make_source(vm, tmp_path, socket=tmp_path / "second").snapshot():
                pytest.fail("was not refused")
        assert "process 1 there" in caught.value.what
        assert await held(vm) == during
    assert await clean(vm)
    assert await held(vm) == before


async def test_from_a_container_the_snapshot_of_the_host_is_left_alone(vm: Vm, tmp_path: Path) -> None:
    async with mount_in([], vm, tmp_path) as process:
        during = await held(vm)
        done = await command(*CONTAINER, PROGRAM, "cleanup", tmp_path / "second")
        done.refused(32, "in another PID namespace", f"process {process.pid} there")
        assert await held(vm) == during
    assert (await command(*CONTAINER, PROGRAM, "cleanup", tmp_path / "second")).code == 0


async def test_of_two_who_begin_at_once_one_is_refused(vm: Vm, tmp_path: Path) -> None:
    refused = []

    async def begin(name: str, arguments: dict[str, object]) -> None:
        if name == "blockdev-add" and str(arguments["node-name"]).startswith(OWNER):
            with pytest.raises(UserError, match="about to take a snapshot"):
                async with make_source(vm, tmp_path, socket=tmp_path / "second").snapshot():
                    pytest.fail("was not refused")
            refused.append(name)

    source = make_source(vm, tmp_path, socket=tmp_path / "proxy")
    async with running_proxy(vm.qmp, source.socket, begin), source.snapshot():
        assert refused
