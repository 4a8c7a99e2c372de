# SPDX-License-Identifier: LGPL-2.1-or-later
"""A session with a domain's guest agent through libvirt, which keeps the agent's commands and answers in step.

Where libvirtd dies in the middle the guest must thaw all the same: then QEMU takes the next client of the agent's
socket, and we are that. While libvirtd lives it has the socket.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import trio

from qfsbackup.patience import NoAnswerError, in_time
from qfsbackup.vm.agent import ANSWER_TIMEOUT, AgentError
from qfsbackup.vm.agents import socket_session
from qfsbackup.vm.monitors.libvirt_domain import AgentSilentError, Domain, Ears, LibvirtError, open_domain
from qfsbackup.vm.monitors.libvirt_xml import agent_socket

CLOSE_TIMEOUT = 2.0  # seconds
DEAF = Ears(lambda _name, _data: None, lambda: None, lambda: None)


class DomainSession:
    """See vm.agent.Agent; made by `opened`."""

    def __init__(self, uri: str, name: str) -> None:
        self._open = partial(open_domain, uri, name, DEAF)
        self._domain: Domain | None = None
        self._socket: Path | None = None
        self._one = trio.CapacityLimiter(1)  # a thread keeps it for as long as libvirt has its command
        self._in_step = True

    @property
    def in_step(self) -> bool:
        """See Agent."""
        return self._in_step

    async def call(self, command: str, timeout: float = ANSWER_TIMEOUT) -> Any:
        """See Agent."""
        self._in_step = False
        try:
            with trio.fail_after(ANSWER_TIMEOUT):
                async with self._one:
                    pass  # libvirt has no command of ours any more
            with trio.fail_after(timeout):
                answer = await self._call(command, timeout)
        except (trio.TooSlowError, NoAnswerError):
            raise AgentError(f"it did not answer within {timeout:.0f} s") from None
        except AgentSilentError as error:
            raise AgentError(str(error)) from error
        except LibvirtError as error:
            if error.lost:
                return await self._directly(command, timeout)
            self._in_step = True
            raise AgentError(str(error)) from error
        self._in_step = True
        return answer

    async def send_unheard(self, command: str) -> None:
        """See Agent: as far as libvirt does, which asks first whether the agent listens."""
        with suppress(AgentError):
            await self.call(command, ANSWER_TIMEOUT)
        self._in_step = False

    async def connect(self) -> Domain:
        """The domain, found again where libvirtd was restarted. Raises LibvirtError, NoAnswerError."""
        if self._domain is None:
            self._domain = await in_time(self._open, ANSWER_TIMEOUT)
            self._socket = agent_socket(await in_time(partial(self._domain.xml, inactive=False), ANSWER_TIMEOUT))
        return self._domain

    async def _call(self, command: str, timeout: float) -> Any:
        domain = await self.connect()
        ask = partial(domain.agent, json.dumps({"execute": command}), math.ceil(timeout))
        answer = await trio.to_thread.run_sync(ask, abandon_on_cancel=True, limiter=self._one)
        return answer["return"]

    async def _directly(self, command: str, timeout: float) -> Any:
        await self.close()
        if self._socket is None:
            raise AgentError("libvirtd is gone")
        async with socket_session.opened(self._socket) as session:
            answer = await session.call(command, timeout)
        self._in_step = True
        return answer

    async def close(self) -> None:
        """Let libvirt go."""
        domain, self._domain = self._domain, None
        if domain:
            with suppress(NoAnswerError):
                await in_time(domain.close, CLOSE_TIMEOUT)


@asynccontextmanager
async def opened(uri: str, name: str) -> AsyncIterator[DomainSession]:
    """Find the domain. Raises AgentError where that cannot be; whether it has an agent shows with the first call."""
    session = DomainSession(uri, name)
    try:
        await session.connect()
    except (LibvirtError, NoAnswerError) as error:
        raise AgentError(f"libvirt: {error}") from error
    try:
        yield session
    finally:
        with trio.CancelScope(shield=True):
            await session.close()


def _thaw(uri: str, name: str) -> None:
    with suppress(LibvirtError):
        open_domain(uri, name, DEAF).agent(json.dumps({"execute": "guest-fsfreeze-thaw"}), math.ceil(ANSWER_TIMEOUT))


if __name__ == "__main__":
    _thaw(*sys.argv[1:])
