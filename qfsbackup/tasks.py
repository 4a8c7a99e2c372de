# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tasks that work behind a block and end with it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def background(*tasks: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Run `tasks` until the block ends.

    An error of the block comes out as it is, not inside an exception group: callers tell errors apart by type.
    """
    try:
        async with trio.open_nursery() as nursery:
            for task in tasks:
                nursery.start_soon(task)
            yield
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if len(group.exceptions) > 1:
            raise
        raise group.exceptions[0] from None


async def finished(begin: Callable[[Callable[[Exception | None], None]], object]) -> None:
    """Until what `begin` begins is over: it is given what to call then, with an error or None. Raises the error."""
    results: list[Exception | None] = []
    over = trio.Event()

    def done(error: Exception | None) -> None:
        results.append(error)
        over.set()

    begin(done)
    await over.wait()
    if results[0]:
        raise results[0]
