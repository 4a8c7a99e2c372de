# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain of libvirt's, by libvirt's own Python module: the only one that knows it. Everything in here may block.

libvirt's event loop turns in a thread of its own, from the first connection to the end of the process. Seen with
libvirt 9.0.0: a command takes 2 to 5 ms; while QEMU hangs, it and every other job of the domain wait for QEMU, and all
that come later for 30 s.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import libvirt
import libvirt_qemu

KEEPALIVE = (5, 3)  # seconds, times: a libvirtd that hangs is as one that is gone after some 20 s
SETTLE_TIMEOUT = 1.0  # seconds


class LibvirtError(Exception):
    """libvirt cannot do it. `lost`: the connection to it broke, so it is not known what became of the call."""

    def __init__(self, reason: str, *, lost: bool = False) -> None:
        super().__init__(reason)
        self.lost = lost


class OffError(LibvirtError):
    """The domain does not run, or is not known at all."""


class AgentSilentError(LibvirtError):
    """No answer of the guest's agent."""


@dataclass(frozen=True)
class Ears:
    """Who is told what happens, in libvirt's thread: QEMU's events, the domain's end, the end of the connection."""

    event: Callable[[str, Mapping[str, Any]], None]
    off: Callable[[], None]
    lost: Callable[[], None]


class Domain:
    """A domain that runs, made by `open_domain`. `run`: which of its runs; another one has another number."""

    def __init__(self) -> None:
        self._connection: libvirt.virConnect = None
        self._domain: libvirt.virDomain = None
        self._undo: list[Callable[[], object]] = []
        self.run, self.uuid = 0, ""

    def open(self, uri: str, name: str, ears: Ears) -> None:
        """Find it. Raises OffError, LibvirtError."""
        self._ask(partial(self._connect, uri))
        self._domain = self._ask(lambda: self._connection.lookupByName(name))
        self.run, self.uuid = self._domain.ID(), self._domain.UUIDString()
        self._ask(partial(self._listen, ears))
        if not self._ask(lambda: self._domain.isActive()):  # asked after we listen, so that its end cannot be missed
            raise OffError("it is shut off")

    def _connect(self, uri: str) -> None:
        self._connection = libvirt.open(uri)
        self._undo.append(self._connection.close)
        self._connection.setKeepAlive(*KEEPALIVE)

    def command(self, text: str, descriptors: list[int], *, settle: bool) -> Mapping[str, Any]:
        """QEMU's answer to a QMP command; `settle`: what happened before it is told first. Raises LibvirtError."""
        answer = self._ask(lambda: _pass(self._domain, text, descriptors))
        if settle:
            self._ask(self._connection.getLibVersion)  # goes the way that the event went before it ...
            _turned()  # ... and so does this, on our side
        result: Mapping[str, Any] = json.loads(answer)
        return result

    def agent(self, text: str, seconds: int) -> Mapping[str, Any]:
        """The guest agent's answer. Raises LibvirtError."""
        result: Mapping[str, Any] = json.loads(
            self._ask(lambda: libvirt_qemu.qemuAgentCommand(self._domain, text, seconds, 0))
        )
        return result

    def xml(self, *, inactive: bool) -> str:
        """The domain as it is, or as it will be when it starts again; without secrets. Raises LibvirtError."""
        text: str = self._ask(lambda: self._domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE if inactive else 0))
        return text

    def _listen(self, ears: Ears) -> None:
        def event(_c: object, _d: object, name: str, _s: int, _us: int, details: str | None, _o: object) -> None:
            ears.event(name, json.loads(details) if details else {})

        def lifecycle(_c: object, _d: object, event: int, _detail: int, _o: object) -> None:
            if event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
                ears.off()

        connection, kind = self._connection, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE
        connection.registerCloseCallback(lambda _c, _reason, _o: ears.lost(), None)
        self._undo.append(connection.unregisterCloseCallback)
        number = connection.domainEventRegisterAny(self._domain, kind, lifecycle, None)
        self._undo.append(lambda: connection.domainEventDeregisterAny(number))
        qemu = libvirt_qemu.qemuMonitorEventRegister(connection, self._domain, None, event, None, 0)
        self._undo.append(lambda: libvirt_qemu.qemuMonitorEventDeregister(connection, qemu))

    def close(self) -> None:
        """Let the connection go: it ends with the last of libvirt's objects that know it."""
        while self._undo:
            with suppress(libvirt.libvirtError):
                self._undo.pop()()
        self._domain = self._connection = None

    def _ask(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except libvirt.libvirtError as error:
            reason = [self._reason(error)]
        raise reason.pop()  # here and so, for an error that is kept would keep the connection

    def _reason(self, error: libvirt.libvirtError) -> LibvirtError:
        code, text = error.get_error_code(), str(error)
        if error.get_error_domain() == libvirt.VIR_FROM_RPC or not (self._connection and self._connection.isAlive()):
            return LibvirtError(text, lost=True)
        if code == libvirt.VIR_ERR_NO_DOMAIN or (code == libvirt.VIR_ERR_OPERATION_INVALID and "not running" in text):
            return OffError(text)
        if code in (libvirt.VIR_ERR_AGENT_UNRESPONSIVE, libvirt.VIR_ERR_AGENT_UNSYNCED):
            return AgentSilentError(text)
        return LibvirtError(text)


def open_domain(uri: str, name: str, ears: Ears) -> Domain:
    """Find a running domain. Raises OffError, LibvirtError."""
    _event_loop()
    domain = Domain()
    try:
        domain.open(uri, name, ears)
    except BaseException:
        domain.close()
        raise
    return domain


def _pass(domain: libvirt.virDomain, text: str, descriptors: list[int]) -> Any:
    if descriptors:
        return libvirt_qemu.qemuMonitorCommandWithFiles(domain, text, descriptors, 0)[0]
    return libvirt_qemu.qemuMonitorCommand(domain, text, 0)


@cache
def _event_loop() -> None:
    def turn() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    libvirt.registerErrorHandler(lambda _context, _error: None, None)  # or it prints every error
    libvirt.virEventRegisterDefaultImpl()
    libvirt.virEventAddTimeout(
        60_000, lambda *_: None, None
    )  # or it returns at once where there is nothing to wait for
    threading.Thread(target=turn, name="libvirt events", daemon=True).start()


def _turned() -> None:
    """Return once the event loop has done what it had to do."""
    done = threading.Event()
    timer = libvirt.virEventAddTimeout(0, lambda *_: done.set(), None)
    done.wait(SETTLE_TIMEOUT)
    libvirt.virEventRemoveTimeout(timer)
