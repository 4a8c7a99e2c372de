# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every descriptor is handed over in the connection in which it is taken, so that connections may be short."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from qfsbackup.vm.fleecing import fleecing_file
from qfsbackup.vm.fleecing_folder import FleecingFolder
from qfsbackup.vm.monitor import QmpRefusedError
from qfsbackup.vm.monitors.qmp_socket import QmpSocket, connect
from qfsbackup.vm.owner import owned
from qfsbackup.vm.server import listening_socket, nbd_server
from tests.harness.vm import Vm
from tests.vm.support import held


class Short(QmpSocket):
    """A monitor whose connections seem to be short: at their end QEMU lets go of what nothing has taken.

    Nothing else of a short connection is shown: the socket stays connected.
    """

    def __init__(self, qmp: QmpSocket) -> None:
        self.__dict__ = qmp.__dict__
        self._open = 0
        self._sent: list[tuple[str, dict[str, Any]]] = []

    @asynccontextmanager
    async def one_connection(self) -> AsyncIterator[None]:
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            while self._sent and not self._open:
                with suppress(QmpRefusedError):  # it was taken
                    await self.execute(*self._sent.pop())

    async def execute_with_fd(self, command: str, arguments: Mapping[str, object], fd: int, **more: Any) -> Any:
        async with self.one_connection():
            answer = await super().execute_with_fd(command, arguments, fd, **more)
            undo = (
                ("closefd", dict(arguments)) if command == "getfd" else ("remove-fd", {"fdset-id": answer["fdset-id"]})
            )
            self._sent.append(undo)
            return answer


async def test_what_needs_a_descriptor_has_it_over_short_connections(paused_vm: Vm, tmp_path: Path) -> None:
    before = await held(paused_vm)
    async with connect(paused_vm.qmp, pytest.fail) as socket:
        qmp = Short(socket)
        for _ in range(2):
            with listening_socket(tmp_path / "nbd") as listener:
                async with (
                    owned(qmp),
                    fleecing_file(qmp, FleecingFolder(tmp_path), "fleecing", 1 << 20),
                    nbd_server(qmp, listener, 1),
                ):
                    assert "fleecing" in str(await held(paused_vm))
    assert await held(paused_vm) == before
