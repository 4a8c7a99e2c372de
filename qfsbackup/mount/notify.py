# SPDX-License-Identifier: LGPL-2.1-or-later
"""What systemd is told of a mount's life, where it started us (sd_notify(3)). Nothing here waits or fails."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

READY = "READY=1"
STOPPING = "STOPPING=1"
ALIVE = "WATCHDOG=1"


def notify(assignment: str) -> None:
    """Say one thing; a systemd that does not listen is not waited for."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection, suppress(OSError):
            connection.setblocking(False)
            connection.connect(address.replace("@", "\0", 1) if address.startswith("@") else address)
            connection.send(assignment.encode())


def more_time(seconds: float) -> None:
    """Ending takes this long still: do not kill us (EXTEND_TIMEOUT_USEC=)."""
    notify(f"EXTEND_TIMEOUT_USEC={seconds * 1e6:.0f}")


def watchdog_interval() -> float | None:
    """How often systemd wants to hear that we are alive, in seconds: twice in WatchdogSec=. None: not at all."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 2e6 if microseconds.isdecimal() and int(microseconds) else None
