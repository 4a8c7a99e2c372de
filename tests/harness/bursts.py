# SPDX-License-Identifier: LGPL-2.1-or-later
"""A Monitor for a QMP socket that others need as well: it connects for a command, or for a few, and leaves.

As a socket has to be used that a manager of VMs comes back to all the time. QEMU's end shows with its process. When it
leaves, it has QEMU let go of descriptors that nothing has taken: whether QEMU does that by itself depends on its
version and on who else is connected.
"""

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import trio

from qfsbackup.errors import UserError
from qfsbackup.tasks import background
from qfsbackup.vm.monitor import (
    COMMAND_TIMEOUT,
    HUNG_TIMEOUT,
    Events,
    Monitor,
    QmpError,
    QmpGoneError,
    QmpRefusedError,
    QmpTimeoutError,
)
from qfsbackup.vm.monitors.qmp_socket import QmpSocket, connect

AGAIN = 0.02  # seconds until a socket that somebody has is tried again


class Bursts(Monitor):
    """See Monitor; made by `bursts`."""

    def __init__(self, path: Path, peer_pid: int, nursery: trio.Nursery) -> None:
        super().__init__(peer_pid)
        self._path, self._nursery = path, nursery
        self._session: QmpSocket
        self._users = 0
        self._sent: list[tuple[str, Mapping[str, object]]] = []  # what undoes it
        self._turn = trio.Lock()  # for who opens or closes the connection

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = COMMAND_TIMEOUT
    ) -> Any:
        """See Monitor."""
        return await self._in_time(command, lambda: self._session.execute(command, arguments), timeout)

    async def execute_with_fd(
        self, command: str, arguments: Mapping[str, object], fd: int, *, timeout: float = COMMAND_TIMEOUT
    ) -> Any:
        """See Monitor."""

        async def send() -> Any:
            answer = await self._session.execute_with_fd(command, arguments, fd)
            number = {"fdset-id": answer.get("fdset-id")}
            self._sent.append(("closefd", arguments) if command == "getfd" else ("remove-fd", number))
            return answer

        return await self._in_time(command, send, timeout)

    async def _in_time(self, command: str, ask: Callable[[], Awaitable[Any]], timeout: float) -> Any:
        if self.gone:
            raise QmpGoneError(command, self.gone)
        try:
            with trio.fail_after(HUNG_TIMEOUT if self.hung else timeout):
                async with self.one_connection():
                    answer = await ask()
        except (trio.TooSlowError, QmpTimeoutError):
            self.hung = True
            raise QmpTimeoutError(command, timeout) from None
        except QmpRefusedError:
            self.hung = False
            raise
        self.hung = False
        return answer

    @asynccontextmanager
    async def listen(self, event: str) -> AsyncIterator[Events]:
        """See Monitor."""
        async with self.one_connection(), self._session.listen(event) as events:
            yield events

    @asynccontextmanager
    async def one_connection(self) -> AsyncIterator[None]:
        """See Monitor."""
        with trio.fail_after(COMMAND_TIMEOUT):
            async with self._turn:
                if not self._users:
                    self._session = await self._nursery.start(self._connected)
                self._users += 1
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                async with self._turn:
                    self._users -= 1
                    if not self._users:
                        await self._forget()
                        self._leave.set()
                        await self._has_left.wait()

    async def _forget(self) -> None:
        while self._sent and not self.hung:
            with suppress(QmpError):  # it was taken, or QEMU is gone
                await self._session.execute(*self._sent.pop(), timeout=HUNG_TIMEOUT)

    async def _connected(self, task_status: trio.TaskStatus[QmpSocket]) -> None:
        self._leave, self._has_left = trio.Event(), trio.Event()
        try:
            while not self._leave.is_set():
                try:
                    async with connect(self._path, lambda _reason: None) as session:
                        task_status.started(session)
                        await self._leave.wait()
                except UserError:
                    await trio.sleep(AGAIN)  # it is somebody else's turn
        finally:
            self._has_left.set()

    async def watch(self, on_gone: Callable[[str], None]) -> None:
        """Tell of QEMU's end."""
        process = os.pidfd_open(self.peer_pid)
        try:
            await trio.lowlevel.wait_readable(process)
        finally:
            os.close(process)
        if not self.gone:
            self.gone = "QEMU ended"
            on_gone(self.gone)


@asynccontextmanager
async def bursts(path: Path, on_gone: Callable[[str], None]) -> AsyncIterator[Bursts]:
    """A session on the socket. Raises UserError."""
    async with connect(path, lambda _reason: None) as first:
        peer_pid = first.peer_pid
    async with trio.open_nursery() as nursery:
        qmp = Bursts(path, peer_pid, nursery)
        async with background(partial(qmp.watch, on_gone)):
            yield qmp
