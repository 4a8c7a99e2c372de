# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest agent client of the tests' own, just enough to ask and to set a guest's state."""

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

from .monitor import Lines, QmpError


@contextlib.asynccontextmanager
async def ask(path: Path) -> AsyncIterator[Callable[..., Awaitable[Any]]]:
    """A function that runs an agent command (`await agent("guest-info")`; raises QmpError), after a guest-sync.

    The agent serves one client: leave the block before the product connects.
    """
    async with await trio.open_unix_socket(str(path)) as stream:
        replies = Lines(stream)

        async def execute(command: str, /, **arguments: Any) -> Any:
            with trio.fail_after(20):
                await stream.send_all(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
                line = await replies.next()
            if line is None:
                raise EOFError("the agent's socket is closed")
            reply = json.loads(line)
            if "error" in reply:
                raise QmpError(reply["error"])
            return reply["return"]

        while await execute("guest-sync", id=4711) != 4711:
            pass  # an answer to somebody before us
        yield execute
