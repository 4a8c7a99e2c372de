# SPDX-License-Identifier: LGPL-2.1-or-later
"""How QMP commands travel to a QEMU: the contract of what stands in `monitors/`, and what can go wrong.

A monitor is opened by an async context manager of its module, which takes `on_gone` and raises UserError where there is
no session to be had. What all of them promise:

Order. Commands may come from several tasks; QEMU carries them out one after the other, as they were called.
Deadlines. Nothing here takes longer than its `timeout`, whatever hangs: QEMU, a daemon in between, a file system. A
    command that is given up may be carried out later. Its answer, should it come, is nobody else's: it is dropped.
`hung`. The last command got no answer in time. The next ones have HUNG_TIMEOUT, so that an undo of twenty steps ends
    soon. They are sent, for what it is worth, where QEMU keeps them in order (its own socket); where a second one would
    stand in the way of others (a daemon's lock) they wait for the answer that is still owed, and fail like that. A
    command that is answered ends it. The caller goes on with its undo, and repeats it in a new session.
`gone`. QEMU, or the way to it, ended for good; all further commands fail at once. `on_gone` hears the reason once, in
    trio's thread, as soon as it is known and not only with the next command, unless the session was over by then. A
    connection that can be made again (a daemon's restart, one of many short ones) is not gone.
`leave`. The caller's own end of asking: QEMU would hang with the next command. Nothing is sent any more, for good, and
    `gone` has the caller's reason; `on_gone` does not hear of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, Protocol

COMMAND_TIMEOUT = 20.0  # seconds; a drain of busy disks on slow storage takes several
HUNG_TIMEOUT = 0.2  # seconds, for the commands after one that was not answered


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


class Monitor(ABC):
    """A session with one QEMU."""

    def __init__(self, peer_pid: int = 0) -> None:
        self.peer_pid = peer_pid  # QEMU's process id, 0 where it is not known here
        self.gone: str | None = None  # why nothing can be asked any more; None as long as something can
        self.hung = False  # has the last command got no answer: see above
        self.is_left = False  # was `leave` called

    def leave(self, reason: str) -> None:
        """Send nothing any more: from now on every command fails as if QEMU were gone."""
        self.gone = reason
        self.is_left = True

    @abstractmethod
    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = COMMAND_TIMEOUT
    ) -> Any:
        """Run a command and return what QEMU returns, within `timeout` seconds.

        Raises QmpRefusedError; QmpGoneError and QmpTimeoutError where it is not known what became of the command.
        """

    @abstractmethod
    async def execute_with_fd(
        self, command: str, arguments: Mapping[str, object], fd: int, *, timeout: float = COMMAND_TIMEOUT
    ) -> Any:
        """Run `add-fd` or `getfd` for a copy of our descriptor `fd`, which no other command gets. Raises as `execute`.

        QEMU keeps the copy until another command takes it, but no longer than the connection.
        """

    def one_connection(self) -> AbstractAsyncContextManager[None]:
        """While open, all commands travel over one connection: a descriptor is sent in here with the one that takes it.

        Raises QmpGoneError. Not to be held longer than that: others may wait for their turn at the socket.
        """
        return nullcontext()  # of one that has but one

    @abstractmethod
    def listen(self, event: str) -> AbstractAsyncContextManager[Events]:
        """While open, collect the events of this name; what happened earlier is none of them. Raises QmpError.

        It keeps a connection, as `one_connection` does.
        """

    async def disk_names(self) -> Mapping[str, str]:
        """Device's id -> what whoever manages the VM calls the disk; empty where nobody does. Raises QmpError."""
        return {}

    async def config(self) -> Mapping[str, bytes]:
        """What whoever manages the VM has written down of it: file name -> content, no secrets. Raises QmpError."""
        return {}
