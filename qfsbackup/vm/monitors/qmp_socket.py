# SPDX-License-Identifier: LGPL-2.1-or-later
"""QMP, QEMU's monitor protocol, for trio: one connection, commands with a deadline, file descriptors, its end.

The only module that knows qemu.qmp (0.0.6) and asyncio. A QMP socket serves one client: while somebody else has it, a
connection is accepted by the kernel and then hears nothing, so everything that can be silent has a deadline here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import trio
import trio_asyncio
from qemu.qmp import ConnectError, EventListener, ExecInterruptedError, ExecuteError, QMPClient, Runstate, StateError

from qfsbackup.errors import UserError
from qfsbackup.patience import NoAnswerError, in_time
from qfsbackup.vm.monitor import COMMAND_TIMEOUT, HUNG_TIMEOUT, Monitor, QmpGoneError, QmpRefusedError, QmpTimeoutError
from qfsbackup.vm.monitors.holder import SECOND_SOCKET, held
from qfsbackup.vm.monitors.socket_path import open_socket

log = logging.getLogger(__name__)
T = TypeVar("T")
LOOK_TIMEOUT = 10.0  # seconds for the file system of a socket, and for /proc

HELD_TIMEOUT = 0.5  # seconds without a greeting, after which we look whether somebody else holds the socket
GREETING_TIMEOUT = 5.0  # seconds; QEMU greets as soon as its main loop turns
DISCONNECT_TIMEOUT = 2.0  # seconds; nothing depends on a polite end


class Events:
    """Those that arrived, in order: calling it waits for the next one and returns its data."""

    def __init__(self, listener: EventListener, call: Callable[..., Awaitable[Any]]) -> None:
        self._listener, self._call = listener, call

    async def __call__(self) -> Mapping[str, Any]:
        message = await self._call(self._listener.get)
        data: Mapping[str, Any] = message.get("data", {})
        return data

    def any(self) -> bool:
        """Is there one? What happened before QEMU answered the last command, is."""
        return not self._listener.empty()


class QmpSocket(Monitor):
    """An open connection, made by `connect`."""

    def __init__(self, client: QMPClient, loop: asyncio.AbstractEventLoop, peer_pid: int) -> None:
        """`peer_pid` is QEMU's process id, 0 where it lives in another PID namespace."""
        super().__init__(peer_pid)
        self._client = client
        self._loop = loop
        self._sending = trio.Lock()

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = COMMAND_TIMEOUT
    ) -> Any:
        """See Monitor."""
        if self.is_left:
            raise QmpGoneError(command, str(self.gone))
        log.debug("QMP: %s %s", command, json.dumps(arguments or {}))
        try:
            with trio.fail_after(HUNG_TIMEOUT if self.hung else timeout):
                result = await self._call(self._client.execute, command, arguments)
        except trio.TooSlowError:
            self.hung = True
            raise QmpTimeoutError(command, timeout) from None
        except ExecuteError as error:
            self.hung = False
            log.debug("QMP: %s was refused: %s", command, error)
            raise QmpRefusedError(command, error.error_class, str(error)) from error
        except (StateError, ExecInterruptedError) as error:
            raise QmpGoneError(command, self.gone or "QEMU closed the connection") from error
        self.hung = False
        return result

    async def execute_with_fd(
        self, command: str, arguments: Mapping[str, object], fd: int, *, timeout: float = COMMAND_TIMEOUT
    ) -> Any:
        """See Monitor."""
        async with self._sending:  # QEMU keeps the last descriptor that came, until one of the two commands takes it
            try:
                self._client.send_fd_scm(fd)
            except (StateError, OSError) as error:
                raise QmpGoneError(command, self.gone or str(error)) from error
            return await self.execute(command, arguments, timeout=timeout)

    @asynccontextmanager
    async def listen(self, event: str) -> AsyncIterator[Events]:
        """See Monitor."""
        with self._client.listener(event) as listener:
            yield Events(listener, self._call)

    async def _call(self, function: Callable[..., Awaitable[Any]], *arguments: object) -> Any:
        return await trio_asyncio.aio_as_trio(function, loop=self._loop)(*arguments)

    async def watch(self, on_gone: Callable[[str], None]) -> None:
        """(asyncio) Wait for the end of the connection."""
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        try:
            await self._client.disconnect()
        except EOFError:
            self.gone = "QEMU ended, or it closed the QMP connection"
        except Exception as error:  # noqa: BLE001 - whatever ended the session is the reason we hand on
            self.gone = f"the QMP connection broke: {error or type(error).__name__}"
        on_gone(self.gone or "the QMP connection was closed")


@asynccontextmanager
async def connect(path: str | os.PathLike[str], on_gone: Callable[[str], None]) -> AsyncIterator[QmpSocket]:
    """A QMP session on the unix socket `path`; if it is lost before the block ends, `on_gone` hears why.

    Raises UserError where there is none to be had.
    """
    name = os.fspath(path)
    with await _in_time(name, partial(open_socket, name)) as plain:
        await _expect_greeting(plain, name)
        peer_pid = struct.unpack("3i", plain.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        async with _asyncio_loop() as loop:
            client = QMPClient()
            client.events.event_filter = lambda _: False  # or it would keep every event of the VM in memory
            await _greet(client, loop, plain, name)
            qmp = QmpSocket(client, loop, peer_pid)
            watcher = loop.create_task(qmp.watch(on_gone))
            try:
                yield qmp
            finally:
                watcher.cancel()
                with trio.move_on_after(DISCONNECT_TIMEOUT, shield=True), suppress(EOFError, OSError, Exception):
                    await trio_asyncio.aio_as_trio(client.disconnect, loop=loop)()


@asynccontextmanager
async def _asyncio_loop() -> AsyncIterator[asyncio.AbstractEventLoop]:
    """An asyncio loop inside trio; what the block raises comes out as it is, not wrapped by the loop's nurseries."""
    # qemu.qmp logs each failure at level ERROR before it raises it; we report it ourselves, once.
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
    try:
        async with trio_asyncio.open_loop() as loop:
            yield loop
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        raise error from error.__cause__


async def _in_time(name: str, call: Callable[[], T]) -> T:
    """Raises UserError where the file system, or /proc, does not answer."""
    try:
        return await in_time(call, LOOK_TIMEOUT)
    except NoAnswerError:
        raise UserError(f"looking at the QMP socket {name} takes too long", "Does its file system hang?") from None


async def _expect_greeting(plain: socket.socket, name: str) -> None:
    """Look at what the server says first, without taking it off the socket."""
    start = await _first_words(plain, name, HELD_TIMEOUT)
    if not start:
        busy = await _in_time(name, partial(held, name))
        if busy is not None:
            raise busy
        start = await _first_words(plain, name, GREETING_TIMEOUT)
    if not start:
        raise UserError(
            f"{name} is silent: another program holds this QMP socket, QEMU hangs, or it is no QMP socket"
            " (a guest agent's, say)",
            SECOND_SOCKET,
        )
    if not start.lstrip().startswith(b"{"):
        raise _not_qmp(name)


async def _first_words(plain: socket.socket, name: str, timeout: float) -> bytes:
    """What comes within `timeout` seconds, left where it is."""
    with trio.move_on_after(timeout), suppress(ConnectionError):
        await trio.lowlevel.wait_readable(plain.fileno())
        start = plain.recv(64, socket.MSG_PEEK)
        if not start:
            raise UserError(f"{name} closed the connection without a QMP greeting", "Is it the VM's QMP socket?")
        return start
    return b""


async def _greet(client: QMPClient, loop: asyncio.AbstractEventLoop, plain: socket.socket, name: str) -> None:
    # qemu.qmp closes the socket that it is given; ours stays for the length of the session.
    try:
        with trio.fail_after(GREETING_TIMEOUT):
            await trio_asyncio.aio_as_trio(client.connect, loop=loop)(plain.dup())
    except trio.TooSlowError:
        raise UserError(f"{name} greeted but does not answer", "Does QEMU hang? Look at its process.") from None
    except ConnectError as error:
        raise _not_qmp(name) from error


def _not_qmp(name: str) -> UserError:
    return UserError(
        f"{name} is a socket but does not speak QMP",
        "It may be the guest agent's, an NBD server's or a human monitor; name the VM's QMP socket (-qmp unix:PATH).",
    )
