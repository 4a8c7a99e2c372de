# SPDX-License-Identifier: LGPL-2.1-or-later
"""Thaw a guest at once, without asking anything first; for the supervisor, so nothing heavy is imported here."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path

TIMEOUT = 2.0  # seconds
# The first byte has the agent forget half a command that it may have (guest-sync in qga/qapi-schema.json).
THAW = b'\xff{"execute": "guest-fsfreeze-thaw", "arguments": {}}\n'


def thaw_unheard(agent: Path) -> None:
    """Have the agent behind this socket thaw; whether it does is for cleanup to see."""
    with socket.socket(socket.AF_UNIX) as connection, suppress(OSError):
        connection.settimeout(TIMEOUT)
        connection.connect(str(agent))
        connection.sendall(THAW)
        connection.recv(1)  # closed before it is read, it might be lost
