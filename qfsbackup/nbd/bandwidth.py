# SPDX-License-Identifier: LGPL-2.1-or-later
"""A limit on the bytes per second that a whole mount reads over NBD, in the order they were asked for."""

from __future__ import annotations

import trio

CATCH_UP = 0.05  # seconds of credit that lateness may earn: timers fire late, the average must not suffer


class Bandwidth:
    """One pace for all disks. Requests are paid for one after the other, so no disk starves another."""

    def __init__(self, rate: int) -> None:
        """`rate` in bytes per second, above 0."""
        self._rate = rate
        self._next = 0.0  # when the next request may go
        self._turn = trio.Lock()  # FIFO

    async def pay(self, length: int) -> None:
        """Wait until `length` bytes may be asked for."""
        async with self._turn:
            await trio.sleep_until(self._next)
            self._next = max(self._next, trio.current_time() - CATCH_UP) + length / self._rate
