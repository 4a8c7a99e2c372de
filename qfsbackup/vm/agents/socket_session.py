# SPDX-License-Identifier: LGPL-2.1-or-later
"""A session with a guest agent through its unix socket.

The agent's socket serves one client, and it accepts connections also where there is no agent: silence is the only
sign. What the agent still owes to an earlier client, or to a command that we gave up, is skipped with
guest-sync-delimited, whose answer begins with a byte that no JSON contains:

    us     FF {"execute": "guest-sync-delimited", "arguments": {"id": 7}}
    agent  {"return": "too late"}  FF {"return": 7}
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import trio

from qfsbackup.vm.agent import ANSWER_TIMEOUT, AgentError

SENTINEL = b"\xff"
LONGEST_ANSWER = 1024 * 1024  # bytes; what we ask for is answered in a few hundred


class SocketSession:
    """See vm.agent.Agent; made by `opened`."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = b""
        self._in_step = False  # does the next line answer the next command

    async def call(self, command: str, timeout: float = ANSWER_TIMEOUT) -> Any:
        """See Agent."""
        if not self._in_step:
            await self._synchronize()
        answer = await self._ask(command, timeout)
        self._in_step = True
        if "return" not in answer:
            raise AgentError(str(answer["error"].get("desc", "an error without a description")))
        return answer["return"]

    async def send_unheard(self, command: str) -> None:
        """See Agent."""
        self._in_step = False
        with _answering(ANSWER_TIMEOUT):
            await self._send(command, {})

    @property
    def in_step(self) -> bool:
        """See Agent."""
        return self._in_step

    async def _synchronize(self) -> None:
        number = secrets.randbits(32)
        with _answering(ANSWER_TIMEOUT):
            await self._send("guest-sync-delimited", {"id": number}, SENTINEL)
            while True:
                await self._discard_to(SENTINEL)
                if _parsed(await self._line()).get("return") == number:
                    return

    async def _ask(self, command: str, timeout: float) -> Mapping[str, Any]:
        self._in_step = False
        with _answering(timeout):
            await self._send(command, {})
            answer = _parsed(await self._line())
        if "return" not in answer and not isinstance(answer.get("error"), dict):
            raise AgentError("it answers nonsense")
        return answer

    async def _send(self, command: str, arguments: Mapping[str, object], before: bytes = b"") -> None:
        message = json.dumps({"execute": command, "arguments": arguments}).encode()
        await self._stream.send_all(before + message + b"\n")

    async def _line(self) -> bytes:
        while b"\n" not in self._buffer:
            await self._receive()
            if len(self._buffer) > LONGEST_ANSWER:
                raise AgentError("it answers without end")
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    async def _discard_to(self, mark: bytes) -> None:
        while mark not in self._buffer:
            self._buffer = b""
            await self._receive()
        self._buffer = self._buffer.split(mark, 1)[1]

    async def _receive(self) -> None:
        data = await self._stream.receive_some()
        if not data:
            raise AgentError("it closed the connection")
        self._buffer += data


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[SocketSession]:
    """Connect to the agent. Raises AgentError where there is none; silence shows with the first call."""
    try:
        stream = await trio.open_unix_socket(str(path))
    except (OSError, ValueError) as error:
        raise AgentError(f"cannot connect to {path}: {error}") from error
    async with stream:
        yield SocketSession(stream)


@contextmanager
def _answering(timeout: float) -> Iterator[None]:
    try:
        with trio.fail_after(timeout):
            yield
    except trio.TooSlowError:
        raise AgentError(f"it did not answer within {timeout:.0f} s") from None
    except trio.BrokenResourceError as error:
        raise AgentError("the connection broke") from error


def _parsed(line: bytes) -> Mapping[str, Any]:
    try:
        answer = json.loads(line)
    except ValueError as error:
        raise AgentError("it answers something that is not JSON") from error
    if not isinstance(answer, dict):
        raise AgentError("it answers nonsense")
    return answer
