# SPDX-License-Identifier: LGPL-2.1-or-later
"""Freeze the guest's file systems for a moment through its agent, and never leave them frozen.

The whole takes less than 10 seconds: Windows thaws by itself then, and a guest that cannot write is hurt. Whatever
happens after the freeze command was sent, thawing follows until the agent says that it is thawed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import trio

from qfsbackup.errors import UserError
from qfsbackup.vm.agent import Agent, AgentError, GuestAgent

log = logging.getLogger(__name__)

FREEZE_TIMEOUT = 6.0  # seconds for freezing alone
HOLD_TIMEOUT = 9.0  # seconds from the freeze command until the thaw command
THAW_TIMEOUT = 30.0  # seconds that thawing is tried for
THAW_PAUSE = 0.2  # seconds between two tries


@dataclass(frozen=True, slots=True)
class Freeze:
    """What the user asked for: `auto` goes on without a freeze where it cannot be had, `require` does not."""

    mode: Literal["auto", "require", "off"]
    agent: GuestAgent | None
    note: Path | None = None  # a file that holds the agent's name for as long as its guest may be frozen by us

    @property
    def tried(self) -> bool:
        """Will the agent be asked at all."""
        return self.mode == "require" or (self.mode == "auto" and self.agent is not None)


class StillFrozenError(UserError):
    """The agent froze, or may have, and does not say that it has thawed."""

    def __init__(self, agent: GuestAgent) -> None:
        super().__init__(
            "the guest's file systems may still be frozen: its agent does not answer",
            f"Have it run guest-fsfreeze-thaw ({agent.name}), or restart the guest.",
        )


@dataclass(slots=True)
class Frozen:
    """`frozen`: by us, now; `held`: all the time, known at the end; `deadline`: on trio's clock, for what is done."""

    frozen: bool = False
    held: bool = False
    deadline: float = math.inf


@asynccontextmanager
async def frozen(freeze: Freeze, *, running: bool) -> AsyncIterator[Frozen]:
    """Freeze for the length of the block, if that is wanted and can be done; `running`: does the guest run.

    Raises UserError where it is required and not had, or did not hold until the end of the block; StillFrozenError.
    """
    state = Frozen()
    async with AsyncExitStack() as stack:
        if freeze.tried:
            try:
                await stack.enter_async_context(_freezing(freeze, running, state))
            except AgentError as error:
                _not_frozen(freeze, str(error))
        yield state
    if state.frozen and not state.held:
        _not_frozen(freeze, "the guest thawed by itself before the snapshot was complete")


def _not_frozen(freeze: Freeze, reason: str) -> None:
    if freeze.mode == "require":
        raise UserError(
            f"the guest's file systems cannot be frozen: {reason}",
            "Is qemu-guest-agent running in the guest, and agent= its socket? freeze=auto goes on without it.",
        )
    log.warning("the snapshot is taken without freezing the guest's file systems: %s", reason)


@asynccontextmanager
async def _freezing(freeze: Freeze, running: bool, state: Frozen) -> AsyncIterator[None]:
    """Raises AgentError where nothing was frozen, StillFrozenError."""
    if freeze.agent is None:
        raise AgentError("no agent socket is named (agent=)")
    if not running:
        raise AgentError("the VM is not running")
    async with freeze.agent.open() as agent:
        if await agent.call("guest-fsfreeze-status") != "thawed":
            raise AgentError("they are frozen already, by somebody else; left so")
        if freeze.note:
            freeze.note.write_text(freeze.agent.name)
        deadline = trio.current_time() + HOLD_TIMEOUT
        try:
            if not await agent.call("guest-fsfreeze-freeze", FREEZE_TIMEOUT):
                raise AgentError("there is nothing to freeze")
            state.frozen, state.deadline = True, deadline
            yield
        finally:
            thawed = await _thaw(agent)
            if thawed is None:
                raise StillFrozenError(freeze.agent)
            state.held = bool(thawed)
            if freeze.note:
                freeze.note.unlink(missing_ok=True)


async def thaw_leftover(guest: GuestAgent) -> bool:
    """Thaw what a qfsbackup that died left frozen; was there anything? Raises AgentError."""
    async with guest.open() as agent:
        if await agent.call("guest-fsfreeze-status") != "frozen":
            return False
        if await _thaw(agent) is None:
            raise AgentError("they do not thaw")
        return True


async def _thaw(agent: Agent) -> int | None:
    """Thaw until it is thawed; how many file systems were still frozen when we began. None: it does not thaw."""
    with trio.move_on_after(THAW_TIMEOUT, shield=True):
        if not agent.in_step:  # it may freeze still, or again: whenever it is done, it is to thaw, even without us
            with suppress(AgentError):
                await agent.send_unheard("guest-fsfreeze-thaw")
        while True:
            try:
                count = await agent.call("guest-fsfreeze-thaw")
                if await agent.call("guest-fsfreeze-status") == "thawed":
                    return int(count)
            except AgentError as error:
                log.warning("thawing the guest's file systems, trying again: %s", error)
            await trio.sleep(THAW_PAUSE)
    return None
