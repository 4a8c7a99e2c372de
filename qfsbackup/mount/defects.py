# SPDX-License-Identifier: LGPL-2.1-or-later
"""Exceptions that nobody can catch: of what C code calls, and of finalizers.

Python hands them to sys.unraisablehook, which prints them to a standard error that is /dev/null in the background. Here
they are logged, and end the block as an exception of its own would: a defect in a callback must not go unseen.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

log = logging.getLogger(__name__)


@asynccontextmanager
async def defects_raised() -> AsyncIterator[None]:
    """The first of them is raised out of the block, in an exception group."""
    token, happened = trio.lowlevel.current_trio_token(), trio.Event()
    found: list[BaseException] = []

    def hook(unraisable: UnraisableHookArgs) -> None:
        error = unraisable.exc_value or unraisable.exc_type()
        log.critical("a defect in %r", unraisable.object, exc_info=error)
        found.append(error)
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(happened.set)

    async def fail() -> None:
        await happened.wait()
        raise found[0]

    old, sys.unraisablehook = sys.unraisablehook, hook
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            yield
            nursery.cancel_scope.cancel()
    finally:
        sys.unraisablehook = old
