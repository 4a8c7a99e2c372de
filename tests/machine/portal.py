# SPDX-License-Identifier: LGPL-2.1-or-later
"""trio in a thread, for rules that are no coroutines: functions run there, contexts are held open there."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from queue import SimpleQueue
from typing import Any, Generic, TypeVar, TypeVarTuple

import trio

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

STEP_TIMEOUT = 90.0  # seconds


class Portal:
    """Made by `open_portal`; to be used from one thread that runs no trio."""

    def __init__(self, token: trio.lowlevel.TrioToken, nursery: trio.Nursery) -> None:
        self._token = token
        self._nursery = nursery

    def call(self, function: Callable[[*Ts], Awaitable[T]], *arguments: *Ts) -> T:
        """What the coroutine returns. Raises what it raises, and trio.TooSlowError."""

        async def bounded() -> T:
            with trio.fail_after(STEP_TIMEOUT):
                return await function(*arguments)

        return trio.from_thread.run(bounded, trio_token=self._token)

    def hold(self, manager: AbstractAsyncContextManager[T]) -> Held[T]:
        """Enter a context; `release()` leaves it. Raises what entering raises."""
        held = Held(self, manager)
        self.call(self._nursery.start, held.run)
        return held


class Held(Generic[T]):
    """An open context and its `value`."""

    value: T

    def __init__(self, portal: Portal, manager: AbstractAsyncContextManager[T]) -> None:
        self._portal = portal
        self._manager = manager
        self._ending, self._ended = trio.Event(), trio.Event()
        self._error: BaseException | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The task that the context lives in."""
        entered = False
        try:
            async with self._manager as self.value:
                entered = True
                task_status.started()
                await self._ending.wait()
        except Exception as error:  # it is raised where the context is left
            if not entered:
                raise
            self._error = error
        finally:
            self._ended.set()

    def release(self) -> None:
        """Leave the context. Raises what leaving raises, and what ended it meanwhile."""
        self._portal.call(self._release)

    async def _release(self) -> None:
        self._ending.set()
        await self._ended.wait()
        if self._error:
            raise self._error


@contextmanager
def open_portal() -> Iterator[Portal]:
    """A portal for the length of the block; contexts that are still open are cancelled at its end."""
    ready: SimpleQueue[Portal] = SimpleQueue()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            ready.put(Portal(trio.lowlevel.current_trio_token(), nursery))
            await trio.sleep_forever()

    def cancel(portal: Portal) -> None:
        portal._nursery.cancel_scope.cancel()

    thread = threading.Thread(target=_run, args=(main,), name="portal")
    thread.start()
    portal = ready.get()
    try:
        yield portal
    finally:
        portal._token.run_sync_soon(cancel, portal)
        thread.join()


def _run(main: Callable[[], Awaitable[Any]]) -> None:
    trio.run(main)
