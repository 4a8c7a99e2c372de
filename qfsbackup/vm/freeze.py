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
from qfsbackup.vm.agent import Agent, AgentError, open_agent

log = logging.getLogger(__name__)

FREEZE_TIMEOUT = 6.0  # seconds for freezing alone
HOLD_TIMEOUT = 9.0  # seconds from the freeze command until the thaw command
THAW_TIMEOUT = 30.0  # seconds that thawing is tried for
THAW_PAUSE = 0.2  # seconds between two tries


@dataclass(frozen=True, slots=True)
class Freeze:
    """What the user asked for: `auto` goes on without a freeze where it cannot be had, `require` does not."""

    mode: Literal["auto", "require", "off"]
    agent: Path | None  # the agent's socket


@dataclass(slots=True)
class Frozen:
    """`frozen`: by us, now; `held`: all the time, known at the end; `deadline`: on trio's clock, for what is done."""

    frozen: bool = False
    held: bool = False
    deadline: float = math.inf


@asynccontextmanager
async def frozen(freeze: Freeze, *, running: bool) -> AsyncIterator[Frozen]:
    """Freeze for the length of the block, if that is wanted and can be done; `running`: does the guest run.

    Raises UserError where it is required and not had, or did not hold until the end of the block.
    """
    state = Frozen()
    async with AsyncExitStack() as stack:
        if freeze.mode == "require" or (freeze.mode == "auto" and freeze.agent):
            try:
                await stack.enter_async_context(_freezing(freeze.agent, running, state))
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
async def _freezing(path: Path | None, running: bool, state: Frozen) -> AsyncIterator[None]:
    """Raises AgentError where nothing was frozen; after the block it does not raise."""
    if path is None:
        raise AgentError("no agent socket is named (agent=)")
    if not running:
        raise AgentError("the VM is not running")
    async with open_agent(path) as agent:
        if await agent.call("guest-fsfreeze-status") != "thawed":
            raise AgentError("they are frozen already, by somebody else; left so")
        deadline = trio.current_time() + HOLD_TIMEOUT
        try:
            if not await agent.call("guest-fsfreeze-freeze", FREEZE_TIMEOUT):
                raise AgentError("there is nothing to freeze")
            state.frozen, state.deadline = True, deadline
            yield
        finally:
            state.held = await _thaw(agent)


async def thaw_leftover(path: Path) -> bool:
    """Thaw what a qfsbackup that died left frozen; was there anything? Raises AgentError."""
    async with open_agent(path) as agent:
        if await agent.call("guest-fsfreeze-status") != "frozen":
            return False
        await _thaw(agent)
        return True


async def _thaw(agent: Agent) -> bool:
    """Thaw until it is thawed; were the file systems still frozen when we began?"""
    with trio.move_on_after(THAW_TIMEOUT, shield=True):
        if not agent.in_step:  # it may freeze still, or again: whenever it is done, it is to thaw, even without us
            with suppress(AgentError):
                await agent.send_unheard("guest-fsfreeze-thaw")
        while True:
            try:
                count = await agent.call("guest-fsfreeze-thaw")
                if await agent.call("guest-fsfreeze-status") == "thawed":
                    return bool(count)
            except AgentError as error:
                log.warning("thawing the guest's file systems, trying again: %s", error)
            await trio.sleep(THAW_PAUSE)
    log.error("the guest's file systems may still be frozen; have its agent run guest-fsfreeze-thaw")
    return False
