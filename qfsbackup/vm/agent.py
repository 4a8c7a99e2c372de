# SPDX-License-Identifier: LGPL-2.1-or-later
"""How commands travel to the QEMU guest agent (qga/qapi-schema.json of QEMU): the contract of what stands in `agents/`.

Nothing heavy is imported here or by a GuestAgent until it is opened: the supervisor has one, to thaw with.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

ANSWER_TIMEOUT = 3.0  # seconds in which an agent that is there answers a simple question


class AgentError(Exception):
    """The agent answered with an error, or with nonsense, or not at all: then it may carry the command out later."""


class Agent(Protocol):
    """A session with an agent. An answer that comes too late is dropped, never taken for another command's."""

    async def call(self, command: str, timeout: float = ANSWER_TIMEOUT) -> Any:
        """Run a command without arguments and return its result, within `timeout` seconds, whatever hangs.

        Where something is still owed to us, that is waited for first, ANSWER_TIMEOUT at most. Raises AgentError.
        """
        ...

    async def send_unheard(self, command: str) -> None:
        """Send a command whose answer nobody waits for: it runs once the agent is through with what it has to do.

        Raises AgentError.
        """
        ...

    @property
    def in_step(self) -> bool:
        """Was every command answered, if only with an error: is nothing owed to us that may still be carried out."""
        ...


class GuestAgent(Protocol):
    """The agent of one guest, whether it is there or not."""

    @property
    def name(self) -> str:
        """What people and a mount's note call it; its source finds it by this name again."""
        ...

    def open(self) -> AbstractAsyncContextManager[Agent]:
        """A session. Raises AgentError where there is none to be had; one that is silent shows with the first call."""
        ...

    def thaw_unheard(self) -> None:
        """Have it thaw within seconds, without asking anything first; whether it does is for others to see."""
        ...
