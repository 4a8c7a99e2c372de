# SPDX-License-Identifier: LGPL-2.1-or-later
"""A task that runs behind a block."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import trio


@contextlib.asynccontextmanager
async def background(task: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Run `task` until the block ends. An error of the block comes out as it is, not inside an exception group, so
    that a test may expect it by its type; only if the task failed as well there is a group of both."""
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task)
            yield
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if len(group.exceptions) > 1:
            raise
        raise group.exceptions[0] from None
