# SPDX-License-Identifier: LGPL-2.1-or-later
"""A QMP socket in front of a VM's, where a test can watch the product and hold it between two commands.

    product --connects to--> proxy.path --forwarded, with file descriptors--> vm.qmp

`on_command` runs before a command reaches QEMU, `on_reply` before its reply reaches the client. Both may take as long
as they like; while they do, nothing more passes in that direction. They may kill the client. One client at a time,
any number of them one after the other, as QEMU itself has it.
"""

import array
import contextlib
import json
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from qfsbackup.tasks import background

from .sockets import listening

_SIZE = 1024 * 1024
_MAX_FDS = 16
_DECODER = json.JSONDecoder()
_PEER = struct.Struct("3i")  # unix(7), struct ucred: process, user and group id

OnCommand = Callable[[str, dict[str, Any]], Awaitable[None]]
OnReply = Callable[[str, dict[str, Any], dict[str, Any]], Awaitable[None]]


async def _pass(*_: object) -> None:
    """The hook of who has none."""


@dataclass
class Proxy:
    """What passed: `commands` in order, with their arguments, and the number of descriptors in `fds`.

    `client` is the process that connected last.
    """

    path: Path
    on_command: OnCommand = _pass
    on_reply: OnReply = _pass
    commands: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    fds: int = 0
    client: int = 0

    @property
    def names(self) -> list[str]:
        """The names of the commands that passed, in order."""
        return [name for name, _ in self.commands]


@contextlib.asynccontextmanager
async def running_proxy(
    server: Path, path: Path, on_command: OnCommand = _pass, on_reply: OnReply = _pass
) -> AsyncIterator[Proxy]:
    """Listen on `path` and forward to the QMP socket `server`. An error in a hook ends the block with that error."""
    proxy = Proxy(path, on_command, on_reply)
    with listening([path]) as [listener]:
        listener.setblocking(False)
        async with background(lambda: _accept(proxy, trio.socket.from_stdlib_socket(listener), server)):
            yield proxy


async def _accept(proxy: Proxy, listener: trio.socket.SocketType, server: Path) -> None:
    while True:
        client, _ = await listener.accept()
        proxy.client = _PEER.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))[0]
        with client, trio.socket.socket(socket.AF_UNIX) as upstream:
            await upstream.connect(str(server))
            await _Session(proxy, client, upstream).run()


class _Session:
    """One client's connection."""

    def __init__(self, proxy: Proxy, client: trio.socket.SocketType, upstream: trio.socket.SocketType) -> None:
        self._proxy, self._client, self._upstream = proxy, client, upstream
        self._waiting: dict[str, tuple[str, dict[str, Any]]] = {}  # command and arguments by the request's id

    async def run(self) -> None:
        """Forward both ways until one side closes."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._until_closed, self._commands, nursery.cancel_scope)
            nursery.start_soon(self._until_closed, self._replies, nursery.cancel_scope)

    async def _until_closed(self, forward: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
        with contextlib.suppress(ConnectionError):
            await forward()
        scope.cancel()

    async def _commands(self) -> None:
        rest, descriptors = "", list[int]()
        try:
            while True:
                text, received = await _receive(self._client)
                descriptors += received
                self._proxy.fds += len(received)
                if not text:
                    return
                messages, rest = _split(rest + text)
                for message in messages:
                    await self._command(message)
                    await _send(self._upstream, message, descriptors)
                    _close(descriptors)
        finally:
            _close(descriptors)

    async def _command(self, text: str) -> None:
        message = json.loads(text)
        name, arguments = message.get("execute") or message.get("exec-oob"), message.get("arguments", {})
        await self._proxy.on_command(name, arguments)
        self._proxy.commands.append((name, arguments))
        self._waiting[json.dumps(message.get("id"))] = (name, arguments)

    async def _replies(self) -> None:
        rest = ""
        while True:
            text, _ = await _receive(self._upstream)
            if not text:
                return
            messages, rest = _split(rest + text)
            for message in messages:
                await self._reply(json.loads(message))
                await _send(self._client, message + "\r\n", [])

    async def _reply(self, message: dict[str, Any]) -> None:
        if "return" in message or "error" in message:
            name, arguments = self._waiting.pop(json.dumps(message.get("id")))
            await self._proxy.on_reply(name, arguments, message)


def _split(text: str) -> tuple[list[str], str]:
    """The complete JSON objects at the start of `text`, and the rest. (QMP needs no line ends between them.)"""
    messages = []
    while text := text.lstrip():
        try:
            _, end = _DECODER.raw_decode(text)
        except json.JSONDecodeError:
            break  # not all of it has arrived
        messages.append(text[:end])
        text = text[end:]
    return messages, text


async def _receive(connection: trio.socket.SocketType) -> tuple[str, list[int]]:
    data, ancillary, _, _ = await connection.recvmsg(_SIZE, socket.CMSG_SPACE(_MAX_FDS * 4))
    descriptors = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(content[: len(content) // 4 * 4])
    return data.decode("ascii"), list(descriptors)  # QMP is ASCII: both ends escape the rest


async def _send(connection: trio.socket.SocketType, text: str, descriptors: list[int]) -> None:
    data = text.encode("ascii")
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors).tobytes())] if descriptors else []
    sent = await connection.sendmsg([data], rights)
    while sent < len(data):
        sent += await connection.send(data[sent:])


def _close(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())
