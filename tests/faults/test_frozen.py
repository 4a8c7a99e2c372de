# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who froze a guest and dies, or cannot thaw it: it is thawed all the same, before anything is asked of QEMU."""

import os
import signal
from pathlib import Path

import pytest
import trio

from qfsbackup.vm.ours import OWNER
from tests.e2e.support import idle_vm, left_as_it_was
from tests.faults.support import mounter, nothing_of_ours
from tests.harness.qemu import Qemu
from tests.harness.qmp_proxy import running_proxy
from tests.vm.fake_agent import Guest, fake_agent

pytestmark = pytest.mark.one_qemu


async def test_a_killed_worker_s_guest_is_thawed_while_qemu_is_stuck(qemu: Qemu, tmp_path: Path) -> None:
    guest, pids, killed = Guest(), list[int](), list[str]()

    async def stuck(name: str, arguments: dict[str, object]) -> None:
        node = str(arguments.get("node-name", ""))
        if name == "blockdev-add" and node.startswith(OWNER):
            pids.append(int(node.removeprefix(OWNER).split("-")[0], 16))
        if guest.state == "frozen":
            if not killed:
                killed.append(name)
                os.kill(pids[0], signal.SIGKILL)
            with trio.fail_after(5):
                await guest.thawed.wait()

    async with (
        idle_vm(qemu, tmp_path) as vm,
        left_as_it_was(vm),
        fake_agent(tmp_path / "agent", guest.answer) as agent,
        running_proxy(vm.qmp, tmp_path / "proxy", stuck) as proxy,
        mounter(tmp_path / "mnt") as mounting,
    ):
        assert await mounting.mount(proxy.path, tmp_path / "mnt", f"fleece={tmp_path},agent={agent}") is not None
        assert killed
        assert guest.thawed.is_set()
        await nothing_of_ours(vm)
