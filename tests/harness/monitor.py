# SPDX-License-Identifier: LGPL-2.1-or-later
"""A QMP client of the tests' own, so that what the product says about a VM can be checked without the product."""

import array
import contextlib
import itertools
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import trio

from qfsbackup.tasks import background


class QmpError(Exception):
    """QEMU refused a command: its description is the message, its class `error_class`."""

    def __init__(self, error: dict[str, str]) -> None:
        super().__init__(error["desc"])
        self.error_class = error["class"]


class Monitor:
    """One QMP session: `execute()` commands, wait for an `event()`. Made by `connected()`."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._ids = itertools.count(1)
        self._replies: dict[int, trio.MemorySendChannel[dict[str, Any]]] = {}
        self._events: list[dict[str, Any]] = []
        self._arrived = trio.Condition()
        self._closed = False

    async def pass_fd(self, descriptor: int) -> None:
        """Send a file descriptor; the next add-fd or getfd takes it. The descriptor here stays open."""
        rights = array.array("i", [descriptor]).tobytes()
        await self._stream.socket.sendmsg([b" "], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])

    async def execute(self, command: str, arguments: dict[str, Any] | None = None, /, **more: Any) -> Any:
        """Run a command; in keyword arguments `_` stands for `-`. Raises QmpError, or EOFError when QEMU is gone."""
        values = (arguments or {}) | {name.replace("_", "-"): value for name, value in more.items()}
        number = next(self._ids)
        send, receive = trio.open_memory_channel[dict[str, Any]](1)
        self._replies[number] = send
        try:
            if self._closed:
                raise EOFError("QEMU closed the monitor")
            await self._send({"execute": command, "arguments": values, "id": number})
            async for reply in receive:
                if "error" in reply:
                    raise QmpError(reply["error"])
                return reply["return"]
            raise EOFError(f"QEMU closed the monitor during {command}")
        finally:
            del self._replies[number]

    async def event(self, name: str, *, timeout: float = 20, **data: Any) -> dict[str, Any]:
        """Wait for the next event `name` whose data has these values, and take it; earlier ones still count."""
        wanted = {key.replace("_", "-"): value for key, value in data.items()}.items()
        with trio.fail_after(timeout):
            async with self._arrived:
                while True:
                    for event in self._events:
                        if event["event"] == name and wanted <= event.get("data", {}).items():
                            self._events.remove(event)
                            return event
                    if self._closed:
                        raise EOFError(f"QEMU closed the monitor before {name}")
                    await self._arrived.wait()

    def seen(self, name: str) -> bool:
        """Whether an event that nobody took has arrived."""
        return any(event["event"] == name for event in self._events)

    async def _send(self, message: dict[str, Any]) -> None:
        try:
            await self._stream.send_all(json.dumps(message).encode() + b"\n")
        except trio.BrokenResourceError as error:
            raise EOFError("QEMU closed the monitor") from error

    async def read(self) -> None:
        """Distribute what QEMU sends, until it closes the connection."""
        try:
            lines = Lines(self._stream)
            while line := await lines.next():
                await self._distribute(json.loads(line))
        except trio.BrokenResourceError:
            pass  # a killed QEMU: the same end
        finally:
            await self._close()

    async def _distribute(self, message: dict[str, Any]) -> None:
        if "event" in message:
            async with self._arrived:
                self._events.append(message)
                self._arrived.notify_all()
        elif message.get("id") in self._replies:
            self._replies[message["id"]].send_nowait(message)

    async def _close(self) -> None:
        self._closed = True
        for channel in self._replies.values():
            channel.close()
        with trio.CancelScope(shield=True):
            async with self._arrived:
                self._arrived.notify_all()


class Lines:
    """The lines of a stream. (Not a generator: one that is dropped half-way cannot be finalized quietly.)"""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._rest = b""

    async def next(self) -> bytes | None:
        """The next line without its end, None at the end of the stream; a last part that has no end is no line."""
        while b"\n" not in self._rest:
            chunk = await self._stream.receive_some()
            if not chunk:
                return None
            self._rest += chunk
        line, self._rest = self._rest.split(b"\n", 1)
        return line


@contextlib.asynccontextmanager
async def connected(path: Path) -> AsyncIterator[Monitor]:
    """A QMP session on the socket `path`, past the greeting and the capabilities."""
    async with await trio.open_unix_socket(str(path)) as stream:
        monitor = Monitor(stream)
        async with background(monitor.read):
            with trio.fail_after(10):
                await monitor.execute("qmp_capabilities")
            yield monitor
