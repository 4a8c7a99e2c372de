# SPDX-License-Identifier: LGPL-2.1-or-later
"""A running QEMU VM as a source, however it is reached: a kind says how QMP gets there, and whether the VM is on.

The supervisor has one of these too: what needs trio is imported where it is used.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from qfsbackup.contracts import Mounting, Snapshot, Source
from qfsbackup.errors import EXIT_USAGE, UserError
from qfsbackup.options import Options
from qfsbackup.vm.agent import AgentError, GuestAgent
from qfsbackup.vm.agents.agent_socket import AgentSocket
from qfsbackup.vm.monitor import Monitor


class VmSource(Source):
    """A VM; `fallback` is what it is called where nobody has given it a name."""

    kind = "a VM"

    def __init__(self, name: str, *, place: str, fallback: str) -> None:
        self.name = name
        self.place = place
        self.fallback = fallback

    @abstractmethod
    def connect(self, on_gone: Callable[[str], None]) -> AbstractAsyncContextManager[Monitor]:
        """A session with its QEMU; `on_gone` is told why, should it be lost. Raises UserError."""

    @abstractmethod
    def is_there(self) -> bool:
        """May QEMU be running. Asked by the supervisor, so nothing heavy may be needed."""

    def vm(self, options: Options, qemus: str | None) -> str:
        """What it is called: as the person says, else as QEMU says, else as what it is reached by."""
        return options.vm or qemus or self.fallback

    def agent(self, options: Options) -> GuestAgent | None:
        """The guest's agent, if it is known."""
        return self.agent_called(str(options.agent)) if options.agent else None

    def agent_called(self, name: str) -> GuestAgent:
        """The guest agent of this name; the supervisor has it thaw."""
        return AgentSocket(Path(name))

    def check(self, options: Options) -> None:
        if options.bitmap:
            hint = "A VM's bitmaps are kept for each target: -o target=NAME."
            raise UserError("bitmap= is for an NBD URI", hint, EXIT_USAGE)
        if options.trim_server_data:
            hint = "A VM's snapshot is our own, and is trimmed without it."
            raise UserError("trim-server-data is for an NBD URI", hint, EXIT_USAGE)

    def snapshot(self, mounting: Mounting) -> AbstractAsyncContextManager[Snapshot]:
        from qfsbackup.sources.vm_snapshot import VmSnapshot

        return VmSnapshot(self, mounting).taken()

    async def clean_up(self, options: Options) -> list[str]:
        from qfsbackup.sources.vm_checkpoints import clean_up

        return await clean_up(self, options)

    async def checkpoints(self, options: Options) -> list[str]:
        from qfsbackup.sources.vm_checkpoints import checkpoints

        return await checkpoints(self, options)

    async def forget(self, options: Options, target: str, *, others: bool) -> list[str]:
        from qfsbackup.sources.vm_checkpoints import forget

        return await forget(self, options, target, others=others)

    def thaw_unheard(self, agent: str) -> None:
        self.agent_called(agent).thaw_unheard()

    async def thaw(self, agent: str) -> bool:
        from qfsbackup.vm.freeze import thaw_leftover

        try:
            return await thaw_leftover(self.agent_called(agent))
        except AgentError as error:
            raise UserError(str(error), "Have it run guest-fsfreeze-thaw, or restart the guest.") from error
