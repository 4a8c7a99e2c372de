# SPDX-License-Identifier: LGPL-2.1-or-later
"""trio for a command that a person waits for: Ctrl-C cancels it, and its contexts end in order.

trio's own KeyboardInterrupt comes in whatever task runs just then, among them those of trio-asyncio, which never end
after it (trio-asyncio 0.15).
"""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from qfsbackup.errors import only_error

T = TypeVar("T")


def run(work: Callable[[], Awaitable[T]]) -> T:
    """What `work` returns. Raises what it raises, and KeyboardInterrupt."""
    try:
        return trio.run(_run, work)
    except BaseExceptionGroup as group:
        error = only_error(group)
        raise error from error.__cause__


async def _run(work: Callable[[], Awaitable[T]]) -> T:
    with trio.open_signal_receiver(signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel, signals.__anext__, nursery.cancel_scope)
            result = await work()
            nursery.cancel_scope.cancel()
            return result
    raise KeyboardInterrupt


async def _cancel(signal_comes: Callable[[], Awaitable[int]], scope: trio.CancelScope) -> None:
    await signal_comes()
    scope.cancel()
