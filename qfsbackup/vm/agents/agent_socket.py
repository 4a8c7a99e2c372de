# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest agent behind a unix socket of QEMU's, which serves one client."""

from __future__ import annotations

import socket
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

from qfsbackup.vm.agent import Agent

THAW_TIMEOUT = 2.0  # seconds
# The first byte has the agent forget half a command that it may have (guest-sync in qga/qapi-schema.json).
THAW = b'\xff{"execute": "guest-fsfreeze-thaw", "arguments": {}}\n'


@dataclass(frozen=True, slots=True)
class AgentSocket:
    """See vm.agent.GuestAgent."""

    path: Path

    @property
    def name(self) -> str:
        """The socket's path."""
        return str(self.path)

    def open(self) -> AbstractAsyncContextManager[Agent]:
        """See GuestAgent."""
        from qfsbackup.vm.agents.socket_session import opened  # the supervisor must not have trio in it

        return opened(self.path)

    def thaw_unheard(self) -> None:
        """See GuestAgent."""
        with socket.socket(socket.AF_UNIX) as connection, suppress(OSError):
            connection.settimeout(THAW_TIMEOUT)
            connection.connect(self.name)
            connection.sendall(THAW)
            connection.recv(1)  # closed before it is read, it might be lost
