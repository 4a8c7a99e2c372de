# SPDX-License-Identifier: LGPL-2.1-or-later
"""A snapshot that fails half-way, at each command in turn: the guest runs on, and QEMU is as it was."""

import logging
from pathlib import Path

import pytest

from qfsbackup.errors import UserError
from qfsbackup.vm.cleanup import undo_leftovers
from qfsbackup.vm.monitors.qmp_socket import connect
from tests.harness.qmp_proxy import running_proxy
from tests.harness.vm import Vm
from tests.vm.refusing import running_refusing
from tests.vm.support import drop_at, held, make_source, server_runs


def nothing(_reason: str) -> None:
    """For connections whose end is no news."""


async def test_the_connection_drops_at_each_command(
    paused_vm: Vm, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    await paused_vm.monitor.execute("cont")
    before = await held(paused_vm)
    number, complete = 0, False
    while not complete:
        source = make_source(paused_vm, tmp_path, socket=tmp_path / "proxy")
        hook = drop_at(number)
        async with running_proxy(paused_vm.qmp, tmp_path / "proxy", hook) as proxy:
            reached = False
            try:
                async with source.snapshot():
                    reached = True
            except UserError:
                assert not reached
            complete = reached and source.status.vm_gone is None
        (tmp_path / "proxy").unlink()
        async with connect(paused_vm.qmp, nothing) as qmp:
            await undo_leftovers(qmp)
        assert await held(paused_vm) == before, f"after a drop at command {number}: {proxy.names[-1:]}"
        number += 1
    assert number > 60
    assert not await server_runs(paused_vm)


async def test_each_command_is_refused(paused_vm: Vm, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    await paused_vm.monitor.execute("cont")
    before = await held(paused_vm)
    async with running_refusing(paused_vm.qmp, tmp_path / "refusing") as refusing:
        number = 0
        while number == 0 or refusing.refused is not None:
            refusing.at(number)
            try:
                async with make_source(paused_vm, tmp_path, socket=refusing.path).snapshot():
                    pass
            except UserError as error:
                assert "refused by the test" in str(error)  # noqa: PT017 - some refusals have no consequence
            async with connect(paused_vm.qmp, nothing) as qmp:
                await undo_leftovers(qmp)
            assert await held(paused_vm) == before, f"after the refusal of command {number}: {refusing.refused}"
            number += 1
    assert number > 60
