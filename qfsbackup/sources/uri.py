# SPDX-License-Identifier: LGPL-2.1-or-later
"""The source `nbd://`, `nbd+unix://`, `nbds://`, `nbds+unix://`: exports of any NBD server, which must not change.

With an export name in the URI that one is the only disk; without, every export of the server is one. What the exports
show has to be frozen by whoever runs the server: there is nothing here to take a snapshot with.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import PurePath
from urllib.parse import parse_qs, urlsplit

from qfsbackup.errors import EXIT_USAGE, UserError
from qfsbackup.facts import Export, Offer, Snapshot
from qfsbackup.status import DiskStatus, Status

SCHEMES = ("nbd", "nbd+unix", "nbds", "nbds+unix")
DEFAULT_DISK = "disk"  # what the export without a name is called
DEFAULT_PORT = 10809  # NBD's, as IANA has it
DIRTY_BITMAP = "qemu:dirty-bitmap:"


@dataclass(frozen=True, slots=True, kw_only=True)
class UriSource:
    """The exports behind an NBD URI."""

    uri: str
    list_exports: Callable[[str], Awaitable[Sequence[Offer]]]  # asks the server; raises UserError
    status: Status
    bitmap: str | None = None  # the bitmap whose context is the dirty map
    trim: bool = False  # may the server's data be trimmed: there is no copy of ours that could be instead
    disks: Collection[str] = ()  # names; none: all
    exclude: Collection[str] = ()
    vm: str | None = None  # what to call the VM, instead of the socket's or the host's name

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Snapshot]:
        """Look what the server offers; see contracts.Source. The instant is now, for want of a better one."""
        named = _by_name(await self.list_exports(self.uri))
        chosen = _choose(named, self.disks, self.exclude)
        exports = tuple(self._export(name, offer) for name, offer in chosen.items())
        for export in exports:
            self.status.disks[export.disk] = DiskStatus(export.size)
        yield Snapshot(
            vm=self.vm or vm_name(self.uri),
            uuid=None,
            instant=time.time_ns(),
            exports=exports,
            details={"source": self.uri},
        )

    def _export(self, name: str, offer: Offer) -> Export:
        context = f"{DIRTY_BITMAP}{self.bitmap}" if self.bitmap else None
        if context and context not in offer.contexts:
            raise UserError(
                f"the export {offer.name!r} has no dirty bitmap {self.bitmap!r}",
                f"Its meta contexts are: {', '.join(offer.contexts) or 'none'}.",
            )
        if self.trim and not offer.can_trim:
            raise UserError(
                f"the server does not let the export {offer.name!r} be trimmed",
                "Leave trim-server-data out.",
                EXIT_USAGE,
            )
        return Export(
            disk=name,
            uri=offer.uri,
            size=offer.size,
            dirty_context=context,
            can_trim=self.trim,
            bitmap="reuse" if context else "none",
            details={"export": offer.name},
        )


def is_nbd_uri(source: str) -> bool:
    """Is `source` meant for this module."""
    return source.partition("://")[0] in SCHEMES and "://" in source


def vm_name(uri: str) -> str:
    """`web1` of `nbd+unix:///disk?socket=/run/web1.sock` and of `nbd://web1/disk`; `web1-10810` of `nbd://web1:10810/`."""
    parts = urlsplit(uri)
    socket = parse_qs(parts.query).get("socket")
    if socket:
        return PurePath(socket[0]).stem
    host = parts.hostname or "localhost"
    return host if parts.port in (None, DEFAULT_PORT) else f"{host}-{parts.port}"


def _by_name(offers: Sequence[Offer]) -> dict[str, Offer]:
    named: dict[str, Offer] = {}
    for offer in offers:
        name = offer.name or DEFAULT_DISK
        if name in named:
            raise UserError(
                f"the NBD server has two exports for the name {name}", "Put one export's name into the URI."
            )
        named[name] = offer
    return named


def _choose(named: dict[str, Offer], wanted: Collection[str], excluded: Collection[str]) -> dict[str, Offer]:
    known = ", ".join(named) or "none"
    for name in (*wanted, *excluded):
        if name not in named:
            raise UserError(f"the NBD server has no disk {name}", f"Its disks are: {known}.", EXIT_USAGE)
    chosen = {name: offer for name, offer in named.items() if name not in excluded and (not wanted or name in wanted)}
    if not chosen:
        raise UserError("every disk of the NBD server is excluded", f"Its disks are: {known}.", EXIT_USAGE)
    return chosen
