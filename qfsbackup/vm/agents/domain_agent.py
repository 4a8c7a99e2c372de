# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest agent of a domain, which is libvirt's: commands go through libvirt, and past it only where it died."""

from __future__ import annotations

import subprocess
import sys
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass

from qfsbackup.vm.agent import Agent

THAW_TIMEOUT = 10.0  # seconds; libvirt itself waits 5 for an agent that is busy


@dataclass(frozen=True, slots=True)
class DomainAgent:
    """See vm.agent.GuestAgent."""

    uri: str
    domain: str

    @property
    def name(self) -> str:
        """The domain's: there is no more than one agent."""
        return f"virsh domfsthaw {self.domain}"

    def open(self) -> AbstractAsyncContextManager[Agent]:
        """See GuestAgent."""
        from qfsbackup.vm.agents.domain_session import opened  # the supervisor must not have trio in it

        return opened(self.uri, self.domain)

    def thaw_unheard(self) -> None:
        """See GuestAgent; by another process, for the supervisor must not have libvirt in it."""
        line = [sys.executable, "-m", "qfsbackup.vm.agents.domain_session", self.uri, self.domain]
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(line, check=False, timeout=THAW_TIMEOUT, stderr=subprocess.DEVNULL)
