# SPDX-License-Identifier: LGPL-2.1-or-later
"""QMP through libvirt's own monitor: commands with a deadline, one at a time, while libvirtd may come and go.

Where libvirtd is restarted a command waits for it. One that was under way then is asked again only if it changes
nothing. A command that QEMU does not answer stays with libvirt, and none is sent after it until it returns.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import trio

from qfsbackup.errors import UserError
from qfsbackup.patience import NoAnswerError, in_time
from qfsbackup.tasks import background
from qfsbackup.vm.monitor import (
    COMMAND_TIMEOUT,
    HUNG_TIMEOUT,
    Monitor,
    QmpError,
    QmpGoneError,
    QmpRefusedError,
    QmpTimeoutError,
)
from qfsbackup.vm.monitors.libvirt_domain import Domain, Ears, LibvirtError, OffError, open_domain
from qfsbackup.vm.monitors.libvirt_xml import targets
from qfsbackup.vm.monitors.qemu_process import process_of

log = logging.getLogger(__name__)
T = TypeVar("T")

CONNECT_TIMEOUT = 10.0  # seconds
FIRST_TIMEOUT = 5.0  # seconds for the first answer of QEMU's main loop
AGAIN = 0.2  # seconds between two tries to find libvirtd again
CLOSE_TIMEOUT = 2.0  # seconds; nothing depends on a polite end
HINT = "Does libvirtd (or virtqemud) run, and may you use it? `virsh list --all` shows what it knows."
HARMLESS = ("query-", "qom-get", "qom-list")  # what these begin is asked again


class Events:
    """Those that arrived, in order: calling it waits for the next one and returns its data."""

    def __init__(self) -> None:
        self.arrived, self._next = trio.open_memory_channel[Mapping[str, Any]](math.inf)

    async def __call__(self) -> Mapping[str, Any]:
        return await self._next.receive()

    def any(self) -> bool:
        """Is there one? What happened before QEMU answered the last command, is."""
        return self._next.statistics().current_buffer_used > 0


class LibvirtMonitor(Monitor):
    """The monitor of a running domain, made by `connect`."""

    def __init__(self, uri: str, name: str, on_gone: Callable[[str], None]) -> None:
        super().__init__()
        self._uri, self._name, self._on_gone = uri, name, on_gone
        self._token = trio.lowlevel.current_trio_token()
        self._domain: Domain | None = None
        self._dead: Domain | None = None  # of a connection that was lost
        self._run: int | None = None
        self._changed = trio.Event()  # the connection came or went
        self._one = trio.CapacityLimiter(1)  # a thread keeps it for as long as libvirt has its command
        self._listening: list[tuple[str, Events]] = []

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = COMMAND_TIMEOUT
    ) -> Any:
        """See Monitor."""
        return await self._execute(command, arguments or {}, None, timeout)

    async def execute_with_fd(
        self, command: str, arguments: Mapping[str, object], fd: int, *, timeout: float = COMMAND_TIMEOUT
    ) -> Any:
        """See Monitor."""
        return await self._execute(command, arguments, fd, timeout)

    async def disk_names(self) -> Mapping[str, str]:
        """See Monitor: the targets, such as vda, by which every user of libvirt knows the disks."""
        return targets(await self._xml(inactive=False))

    async def config(self) -> Mapping[str, bytes]:
        """See Monitor."""
        live, inactive = await self._xml(inactive=False), await self._xml(inactive=True)
        return {"domain.xml": inactive.encode(), "domain-live.xml": live.encode()}

    async def _xml(self, *, inactive: bool) -> str:
        """libvirtd has it, also while QEMU hangs."""

        async def ask(domain: Domain) -> str:
            return await in_time(partial(domain.xml, inactive=inactive), CONNECT_TIMEOUT)

        try:
            return await self._ask("XML", ask, again=True)
        except NoAnswerError as error:
            raise QmpGoneError("XML", f"libvirt: {error}") from error

    @asynccontextmanager
    async def listen(self, event: str) -> AsyncIterator[Events]:
        """See Monitor."""
        events = Events()
        self._listening.append((event, events))
        try:
            await self.execute("query-name")  # what happened before this is told before its answer ...
            while events.any():
                await events()  # ... and is not meant
            yield events
        finally:
            self._listening.remove((event, events))

    async def _execute(self, command: str, arguments: Mapping[str, object], fd: int | None, timeout: float) -> Any:
        message = json.dumps({"execute": command, "arguments": arguments})
        log.debug("QMP: %s", message)
        send = partial(self._send, message=message, fd=fd)
        try:
            with trio.fail_after(HUNG_TIMEOUT if self.hung else timeout):
                answer = await self._ask(command, send, again=command.startswith(HARMLESS))
        except trio.TooSlowError:
            self.hung = True
            raise QmpTimeoutError(command, timeout) from None
        self.hung = False
        if "error" in answer:
            log.debug("QMP: %s was refused: %s", command, answer["error"]["desc"])
            raise QmpRefusedError(command, answer["error"]["class"], answer["error"]["desc"])
        return answer["return"]

    async def _ask(self, command: str, ask: Callable[[Domain], Awaitable[T]], *, again: bool) -> T:
        """`again`: as often as libvirtd goes away meanwhile. Raises QmpGoneError."""
        while True:
            domain = await self._connected(command)
            try:
                return await ask(domain)
            except OffError as error:
                self._end(str(error))
                raise QmpGoneError(command, str(self.gone)) from error
            except LibvirtError as error:
                if error.lost:
                    self._lost(domain)
                if not (error.lost and again):
                    raise QmpGoneError(command, f"libvirt: {error}") from error

    async def _send(self, domain: Domain, message: str, fd: int | None) -> Mapping[str, Any]:
        unsent = [[] if fd is None else [os.dup(fd)]]  # whoever takes these closes them: cancelled, we are gone first

        def send() -> Mapping[str, Any]:
            descriptors = unsent.pop()
            try:
                return domain.command(message, descriptors, settle=bool(self._listening))
            finally:
                _close(descriptors)

        try:
            return await trio.to_thread.run_sync(send, abandon_on_cancel=True, limiter=self._one)
        finally:
            with suppress(IndexError):
                _close(unsent.pop())

    async def _connected(self, command: str) -> Domain:
        while self._domain is None or self.gone:
            if self.gone:
                raise QmpGoneError(command, self.gone)
            await self._changed.wait()
        return self._domain

    async def open(self) -> None:
        """Connect, and know the domain's end from now on. Raises OffError, LibvirtError, NoAnswerError."""
        opened: list[Domain] = []
        off = partial(self._end, "the domain was shut off")
        ears = Ears(self._soon(self._event), self._soon(off), self._soon(lambda: self._lost(*opened)))
        domain = await in_time(partial(open_domain, self._uri, self._name, ears), CONNECT_TIMEOUT)
        opened.append(domain)
        if self._run not in (None, domain.run):
            await in_time(domain.close, CLOSE_TIMEOUT)
            raise OffError("the domain was started anew")
        self._run, self._domain = domain.run, domain
        self.peer_pid = self.peer_pid or await process_of(domain.uuid)
        self._change()

    def _soon(self, function: Callable[..., None]) -> Callable[..., None]:
        def tell(*arguments: object) -> None:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(function, *arguments)

        return tell

    async def stay(self) -> None:
        """Connect again whenever the connection to libvirtd is lost, until the domain's end."""
        while not self.gone:
            if self._domain is not None:
                await self._changed.wait()
                continue
            await self.close()
            try:
                await self.open()
                log.warning("libvirtd is back")
            except OffError as error:
                self._end(str(error))
            except (LibvirtError, NoAnswerError):
                await trio.sleep(AGAIN)

    async def close(self) -> None:
        """Let libvirt go."""
        for domain in (self._domain, self._dead):
            if domain:
                with suppress(NoAnswerError):
                    await in_time(domain.close, CLOSE_TIMEOUT)
        self._domain = self._dead = None

    def _event(self, name: str, data: Mapping[str, Any]) -> None:
        for wanted, events in self._listening:
            if wanted == name:
                events.arrived.send_nowait(data)

    def _end(self, reason: str) -> None:
        if not self.gone:
            self.gone = reason
            self._change()
            self._on_gone(reason)

    def _lost(self, *domain: Domain) -> None:
        if self._domain in domain:
            log.warning("libvirtd is gone; the domain runs on")
            self._domain, self._dead = None, self._domain
            self._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


@asynccontextmanager
async def connect(uri: str, name: str, on_gone: Callable[[str], None]) -> AsyncIterator[LibvirtMonitor]:
    """The monitor of a running domain; if the domain ends before the block does, `on_gone` hears why.

    Raises UserError where there is none to be had.
    """
    monitor = LibvirtMonitor(uri, name, on_gone)
    try:
        await _first(monitor, name)
        async with background(monitor.stay):
            yield monitor
    finally:
        with trio.CancelScope(shield=True):
            await monitor.close()


async def _first(monitor: LibvirtMonitor, name: str) -> None:
    try:
        await monitor.open()
        await monitor.execute("query-status", timeout=FIRST_TIMEOUT)
    except OffError as error:
        raise UserError(f"domain {name} does not run: {error}", "Start it first, or see `virsh list --all`.") from error
    except LibvirtError as error:
        raise UserError(f"libvirt does not give domain {name}: {error}", HINT) from error
    except NoAnswerError:
        raise UserError("libvirtd does not answer", "Look at its process and its log.") from None
    except QmpTimeoutError:
        raise UserError(
            f"the QEMU of domain {name} does not answer through libvirt",
            "Does it hang, or does libvirt something long with the domain? See `virsh domjobinfo`.",
        ) from None
    except QmpError as error:
        raise UserError(f"libvirt does not pass commands on to domain {name}: {error.desc}", HINT) from error


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
