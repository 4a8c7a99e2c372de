# SPDX-License-Identifier: LGPL-2.1-or-later
"""How QMP commands travel to a QEMU: the contract of what stands in `monitors/`, and what can go wrong."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

COMMAND_TIMEOUT = 20.0  # seconds; a drain of busy disks on slow storage takes several


class QmpError(Exception):
    """A command failed. `error_class` and `desc` are QEMU's where it answered."""

    def __init__(self, command: str, error_class: str, desc: str) -> None:
        super().__init__(f"{command}: {desc}")
        self.command = command
        self.error_class = error_class
        self.desc = desc


class QmpRefusedError(QmpError):
    """QEMU answered with an error."""


class QmpGoneError(QmpError):
    """The connection is lost; whether the command was carried out is unknown."""

    def __init__(self, command: str, reason: str) -> None:
        super().__init__(command, "Gone", reason)


class QmpTimeoutError(QmpError):
    """No answer in time; QEMU may carry the command out later."""

    def __init__(self, command: str, seconds: float) -> None:
        super().__init__(command, "Timeout", f"QEMU did not answer within {seconds:.0f} s")


class Events(Protocol):
    """Those that arrived, in order: calling it waits for the next one and returns its data."""

    async def __call__(self) -> Mapping[str, Any]: ...

    def any(self) -> bool:
        """Is there one? What happened before QEMU answered the last command, is."""
        ...


class Monitor(Protocol):
    """A session with one QEMU."""

    @property
    def peer_pid(self) -> int:
        """QEMU's process id, 0 where it is not known here."""
        ...

    @property
    def gone(self) -> str | None:
        """Why nothing can be asked any more; None as long as something can."""
        ...

    @property
    def hung(self) -> bool:
        """Has the last command got no answer."""
        ...

    @property
    def is_left(self) -> bool:
        """Was `leave` called."""
        ...

    def leave(self, reason: str) -> None:
        """Send nothing any more: from now on every command fails as if QEMU were gone."""
        ...

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = COMMAND_TIMEOUT
    ) -> Any:
        """Run a command and return what QEMU returns, within `timeout` seconds.

        Raises QmpRefusedError; QmpGoneError and QmpTimeoutError where it is not known what became of the command.
        """
        ...

    async def execute_with_fd(
        self, command: str, arguments: Mapping[str, object], fd: int, *, timeout: float = COMMAND_TIMEOUT
    ) -> Any:
        """Run `add-fd` or `getfd` for a copy of our descriptor `fd`. Raises as `execute` does."""
        ...

    def listen(self, event: str) -> AbstractAsyncContextManager[Events]:
        """While open, collect the events of this name."""
        ...

    async def disk_names(self) -> Mapping[str, str]:
        """Device's id -> what whoever manages the VM calls the disk; empty where nobody does. Raises QmpError."""
        ...

    async def config(self) -> Mapping[str, bytes]:
        """What whoever manages the VM has written down of it: file name -> content, no secrets. Raises QmpError."""
        ...
