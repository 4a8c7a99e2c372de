# SPDX-License-Identifier: LGPL-2.1-or-later
"""Many calls that wait for a file system, a few at a time: below `restic mount` that halves the time of a look.

The threads may be left behind where one hangs (concurrent.futures would have the process wait for it at its end).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TypeVar

AT_ONCE = 8

T = TypeVar("T")
R = TypeVar("R")


def each(call: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """What `call` returns for each item, in their order. Raises what one of them raised."""
    waiting, results = iter(enumerate(items)), SimpleQueue[tuple[int, R | Exception]]()
    turn = threading.Lock()

    def work() -> None:
        while True:
            with turn:
                number, item = next(waiting, (-1, None))
            if item is None:
                return
            try:
                results.put((number, call(item)))
            except Exception as error:  # noqa: BLE001 - it is the caller's
                results.put((number, error))

    for _ in range(min(AT_ONCE, len(items))):
        threading.Thread(target=work, daemon=True).start()
    found = dict(results.get() for _ in items)
    return [_unless_raised(found[number]) for number in range(len(items))]


def _unless_raised(result: R | Exception) -> R:
    if isinstance(result, Exception):
        raise result
    return result
