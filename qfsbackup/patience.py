# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls that storage or another process may hold up, away from the event loop: each in a thread, with a deadline.

A thread that hangs in the kernel cannot be ended. It is left behind, and ends with the process; nobody waits for it.
Each call has a thread of its own, so that those which hang take none from the others. Who calls again and again waits
for one call before the next, or gives up for good.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import trio

T = TypeVar("T")


class NoAnswerError(Exception):
    """The call has not returned in time. What becomes of it is not known."""


async def in_time(call: Callable[[], T], seconds: float, *, grace: float = 0.0) -> T:
    """What `call` returns or raises, within so many seconds. Raises NoAnswerError.

    Cancelled, it gives the call `grace` seconds more, for what should not be left half-way; what it returns then is the
    answer all the same.
    """
    result: list[T] = []
    errors: list[Exception] = []
    scope = trio.CancelScope(shield=grace > 0, deadline=trio.current_time() + seconds)

    async def run() -> None:
        with scope:
            try:
                limiter = trio.CapacityLimiter(1)
                result.append(await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=limiter))
            except Exception as error:  # noqa: BLE001 - it is the caller's, but not inside a group
                errors.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(_hurry, scope, grace)
        await run()
        nursery.cancel_scope.cancel()
    if errors:
        raise errors.pop()  # kept here, it would keep what its traceback knows
    if not result:
        raise NoAnswerError(f"no answer within {seconds:.0f} s")
    return result[0]


class Patience:
    """With one thing that is asked again and again. Once it did not answer in time it is not asked any more."""

    def __init__(self, seconds: float, closing: float) -> None:
        """`seconds` for each call; `closing` for one that gives something back."""
        self._seconds = seconds
        self._closing = closing
        self.is_over = False  # also while a call is with it

    async def ask(self, call: Callable[[], T], *, grace: float = 0.0) -> T:
        """See `in_time`. Raises NoAnswerError."""
        return await self._ask(call, self._seconds, grace)

    async def _ask(self, call: Callable[[], T], seconds: float, grace: float) -> T:
        if self.is_over:
            raise NoAnswerError("it did not answer before")
        self.is_over = True
        try:
            result = await in_time(call, seconds, grace=grace)
        except NoAnswerError:
            raise
        except Exception:
            self.is_over = False
            raise
        self.is_over = False
        return result

    async def let_go(self, call: Callable[[], object]) -> None:
        """Give something back, also when cancelled. Where that does not return, it goes with the process."""
        with trio.CancelScope(shield=True), suppress(NoAnswerError):
            await self._ask(call, self._closing, 0.0)


async def _hurry(scope: trio.CancelScope, grace: float) -> None:
    try:
        await trio.sleep_forever()
    except trio.Cancelled:  # who called is told at his next checkpoint
        scope.deadline = min(scope.deadline, trio.current_time() + grace)
