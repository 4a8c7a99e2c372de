# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shows systemd that a mount has not come to a standstill."""

from __future__ import annotations

import trio

from qfsbackup.mount.notify import ALIVE, notify, watchdog_interval


async def tell_the_watchdog() -> None:
    """Say that the event loop turns, as often as systemd wants to hear it."""
    interval = watchdog_interval()
    while interval:
        notify(ALIVE)
        await trio.sleep(interval)
