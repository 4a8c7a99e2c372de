# SPDX-License-Identifier: LGPL-2.1-or-later
"""A QMP socket that others need as well: a snapshot is taken and taken down in short connections."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

import trio

from qfsbackup.sources.qemu import QemuSource
from qfsbackup.vm.monitor import Monitor
from qfsbackup.vm.monitors.qmp_socket import connect
from tests.harness.bursts import bursts
from tests.harness.vm import Vm
from tests.vm.support import held, make_source

TURN = 5  # seconds in which somebody else has the socket once


class Shared(QemuSource):
    """A VM whose socket is everybody's."""

    def connect(self, on_gone: Callable[[str], None]) -> AbstractAsyncContextManager[Monitor]:
        return bursts(self._socket, on_gone)


async def test_a_snapshot_over_a_socket_that_somebody_else_needs_too(paused_vm: Vm, tmp_path: Path) -> None:
    before = await held(paused_vm)
    source = make_source(paused_vm, tmp_path)
    async with replace(source, source=Shared(paused_vm.qmp)).snapshot() as snapshot:
        with trio.fail_after(TURN):
            async with connect(paused_vm.qmp, print) as qmp:
                assert len(await qmp.execute("query-block-exports")) > len(snapshot.disks)
    assert await held(paused_vm) == before
