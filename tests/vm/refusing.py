# SPDX-License-Identifier: LGPL-2.1-or-later
"""A QMP socket in front of a VM's that refuses the command of a given number, with an error of the right form.

A fake, because the real QEMU cannot be made to refuse any command one likes.
"""

import contextlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from qfsbackup.tasks import background
from tests.harness.sockets import listening

_SIZE = 1024 * 1024


class Refusing:
    """What is refused is said by `at` or `command`; `refused` is then the name of what was refused, None before."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.refused: str | None = None
        self._name: str | None = None
        self._number: int | None = None
        self._passed = 0

    def at(self, number: int) -> None:
        """Refuse the command of this number, counted from 0 and from now."""
        self._name, self._number, self.refused, self._passed = None, number, None, 0

    def command(self, name: str, number: int) -> None:
        """Refuse the command of this name, after `number` of them."""
        self._name, self._number, self.refused, self._passed = name, number, None, 0

    def answer(self, message: bytes) -> bytes | None:
        """The refusal of this message, None if it may pass."""
        command = json.loads(message)
        name = command.get("execute")
        if name == "qmp_capabilities" or self.refused is not None or self._name not in (None, name):
            return None
        self._passed += 1
        if self._passed - 1 != self._number:
            return None
        self.refused = name
        error = {"class": "GenericError", "desc": "refused by the test"}
        return json.dumps({"error": error, "id": command["id"]}).encode() + b"\r\n"


@contextlib.asynccontextmanager
async def running_refusing(server: Path, path: Path) -> AsyncIterator[Refusing]:
    """Listen on `path` in front of the QMP socket `server`. The client sends one command at a time, as ours does."""
    refusing = Refusing(path)

    async def accept() -> None:
        while True:
            client, _ = await trio.socket.from_stdlib_socket(listener).accept()
            with client, trio.socket.socket(socket.AF_UNIX) as upstream:
                await upstream.connect(str(server))
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_forward, upstream, client, None, nursery.cancel_scope)
                    nursery.start_soon(_forward, client, upstream, refusing, nursery.cancel_scope)

    with listening([path]) as [listener]:
        listener.setblocking(False)
        async with background(accept):
            yield refusing


async def _forward(
    source: trio.socket.SocketType,
    sink: trio.socket.SocketType,
    refusing: Refusing | None,
    scope: trio.CancelScope,
) -> None:
    with contextlib.suppress(ConnectionError):
        while True:
            data, rights, _, _ = await source.recvmsg(_SIZE, socket.CMSG_SPACE(4))
            if not data:
                break
            refusal = refusing.answer(data) if refusing and data.strip() else None
            if refusal is None:
                await sink.sendmsg([data], rights)
            else:
                await source.send(refusal)
            for _, _, descriptor in rights:
                socket.close(int.from_bytes(descriptor, "little"))
    scope.cancel()
