# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest agent's socket, for what the real agent cannot be made to do: lose an answer, be late, talk garbage."""

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import trio

from qfsbackup.tasks import background

Answer = Callable[[str, dict[str, object]], Awaitable[bytes]]


class Guest:
    """A fake agent's state. `lose`: commands that are carried out without an answer, `lose_count` times."""

    def __init__(self) -> None:
        self.state = "thawed"
        self.debts = b""
        self.thawed = trio.Event()
        self.lose: set[str] = set()
        self.lose_count = 1

    async def answer(self, command: str, arguments: dict[str, object]) -> bytes:
        await trio.lowlevel.checkpoint()
        result = self._run(command, arguments)
        before = b""
        if command == "guest-sync-delimited":
            before, self.debts = self.debts + b"\xff", b""
        if command in self.lose and self.lose_count:
            self.lose_count -= 1
            return b""
        return before + json.dumps({"return": result}).encode() + b"\n"

    def _run(self, command: str, arguments: dict[str, object]) -> object:
        if command == "guest-fsfreeze-status":
            return self.state
        if command == "guest-sync-delimited":
            return arguments["id"]
        self.state, before = {"freeze": "frozen", "thaw": "thawed"}[command.rpartition("-")[2]], self.state
        if self.state == "thawed":
            self.thawed.set()
        return int(before != self.state)


async def silent(_command: str, _arguments: dict[str, object]) -> bytes:
    """An agent that is not there."""
    return b""


@contextlib.asynccontextmanager
async def fake_agent(path: Path, answer: Answer) -> AsyncIterator[Path]:
    """Listen on `path`; every command is answered with the bytes that `answer` gives."""
    with trio.socket.socket(trio.socket.AF_UNIX) as listener:
        await listener.bind(str(path))
        listener.listen()

        async def serve(stream: trio.SocketStream) -> None:
            rest = b""
            with contextlib.suppress(trio.BrokenResourceError):  # a client that was killed
                async for chunk in stream:
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        command = json.loads(line.lstrip(b"\xff"))
                        await stream.send_all(await answer(command["execute"], command["arguments"]))

        async with background(partial(trio.serve_listeners, serve, [trio.SocketListener(listener)])):
            yield path
