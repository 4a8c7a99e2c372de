# SPDX-License-Identifier: LGPL-2.1-or-later
"""The source `libvirt:NAME`: a domain that runs, reached through its libvirt; another one's: `libvirt:URI/NAME`.

The supervisor has one of these, too, and with it neither libvirt's module nor trio.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from importlib.util import find_spec
from urllib.parse import urlsplit

from qfsbackup.errors import EXIT_USAGE, UserError
from qfsbackup.options import Options
from qfsbackup.sources.vm import VmSource
from qfsbackup.vm.agent import GuestAgent
from qfsbackup.vm.agents.domain_agent import DomainAgent
from qfsbackup.vm.monitor import Monitor
from qfsbackup.vm.presence import domain_processes

SYSTEM = "qemu:///system"


class LibvirtSource(VmSource):
    """The domain of this name. A name of libvirt's has no slash, so the last one ends the URI."""

    def __init__(self, uri: str, domain: str) -> None:
        text = domain if uri == SYSTEM else f"{uri}/{domain}"
        super().__init__(f"libvirt:{text}", place=text, fallback=domain)
        self._uri, self._domain = uri, domain

    def connect(self, on_gone: Callable[[str], None]) -> AbstractAsyncContextManager[Monitor]:
        """See VmSource."""
        from qfsbackup.vm.monitors.libvirt import connect

        return connect(self._uri, self._domain, on_gone)

    def agent(self, options: Options) -> GuestAgent:
        """See VmSource: libvirt has it, if the domain has one."""
        return DomainAgent(self._uri, self._domain)

    def agent_called(self, name: str) -> GuestAgent:
        """See VmSource."""
        return DomainAgent(self._uri, self._domain)

    def is_there(self) -> bool:
        """Is a QEMU of this name to be seen: libvirtd, which would know better, may be away."""
        return bool(domain_processes(self._domain))

    def check(self, options: Options) -> None:
        """See contracts.Source."""
        super().check(options)
        if options.agent:
            hint = "Leave agent= out: the domain's XML says whether there is one."
            raise UserError("the agent of a domain is reached through libvirt", hint, EXIT_USAGE)


def source(text: str) -> LibvirtSource:
    """The domain that a person calls so. Raises UserError."""
    uri, _, domain = text.removeprefix("libvirt:").rpartition("/")
    if not domain:
        raise UserError("libvirt: has no domain's name behind it", "`virsh list --all` shows them.", EXIT_USAGE)
    if uri:
        _refuse_remote(uri)
    if find_spec("libvirt") is None or find_spec("libvirt_qemu") is None:
        raise UserError("libvirt's Python module is missing", "Install it: apt-get install python3-libvirt")
    return LibvirtSource(uri or SYSTEM, domain)


def _refuse_remote(uri: str) -> None:
    parts = urlsplit(uri)
    if parts.scheme not in ("qemu", "qemu+unix"):
        kind = "is not QEMU's" if parts.scheme.partition("+")[0] != "qemu" else "goes to another host"
    elif parts.netloc:
        kind = "goes to another host"
    elif parts.path not in ("/system", "/session"):
        kind = "has neither /system nor /session"
    else:
        return
    raise UserError(
        f"libvirt's URI {uri} {kind}",
        "Run qfsbackup where the VM runs, as libvirt:NAME, or libvirt:qemu:///session/NAME.",
        EXIT_USAGE,
    )
