# SPDX-License-Identifier: LGPL-2.1-or-later
"""The memory that all readers of a mount together may use for what they have not asked for yet."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import trio

TOTAL = 32 << 20  # bytes
WINDOW = 4 << 20  # bytes that one reader may be ahead; more was not faster on a local socket
IDLE = 1.0  # seconds after which a reader's window may be taken for another one


class Budget:
    """Bytes that were fetched ahead, or are on their way, and the readers they belong to, the longest idle first."""

    def __init__(self, total: int = TOTAL) -> None:
        self.total = total
        self.used = 0
        self._readers: OrderedDict[object, tuple[float, Callable[[], None]]] = OrderedDict()

    def touch(self, reader: object, drop: Callable[[], None]) -> None:
        """This reader has just read. `drop` gives back all it holds, should it stop and another one need it."""
        self._readers[reader] = trio.current_time(), drop
        self._readers.move_to_end(reader)

    def leave(self, reader: object) -> None:
        """This reader holds nothing any more."""
        self._readers.pop(reader, None)

    def window(self) -> int:
        """How many bytes one reader may be ahead now."""
        if len(self._readers) * WINDOW > self.total:
            self._drop_idle()
        return min(WINDOW, self.total // max(1, len(self._readers)))

    def take(self, length: int) -> bool:
        """Use `length` bytes; False where that is too much."""
        if self.used + length > self.total:
            self._drop_idle()
        if self.used + length > self.total:
            return False
        self.used += length
        return True

    def give(self, length: int) -> None:
        """They are free again."""
        self.used -= length

    def _drop_idle(self) -> None:
        """Take back the windows of the readers that stopped."""
        since = trio.current_time() - IDLE
        for reader, (touched, drop) in list(self._readers.items()):
            if touched > since:
                return
            del self._readers[reader]
            drop()
