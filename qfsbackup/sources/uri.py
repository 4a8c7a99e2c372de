# SPDX-License-Identifier: LGPL-2.1-or-later
"""The source `nbd://`, `nbd+unix://`, `nbds://`, `nbds+unix://`: exports of any NBD server, which must not change.

With an export name in the URI that one is the only disk; without, every export of the server is one. What the exports
show has to be frozen by whoever runs the server: there is nothing here to take a snapshot with.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import PurePath
from urllib.parse import parse_qs, urlsplit

from qfsbackup.contracts import Mounting, Snapshot, SnapshotDisk, Source
from qfsbackup.errors import EXIT_USAGE, UserError
from qfsbackup.nbd.export import Export, Offer
from qfsbackup.options import Options

DEFAULT_DISK = "disk"  # what the export without a name is called
DEFAULT_PORT = 10809  # NBD's, as IANA has it
DIRTY_BITMAP = "qemu:dirty-bitmap:"


class UriSource(Source):
    """The exports behind an NBD URI."""

    kind = "an NBD server"

    def __init__(self, uri: str) -> None:
        self.name = self.place = uri

    def check(self, options: Options) -> None:
        super().check(options)
        if options.discard == "release" and not options.trim_server_data:
            hint = "Leave it out, or say that this data may go once it was read: -o trim-server-data."
            raise UserError("discard=release would trim the server's own data", hint, EXIT_USAGE)

    @asynccontextmanager
    async def snapshot(self, mounting: Mounting) -> AsyncIterator[Snapshot]:
        """The instant is now, for want of a better one."""
        from qfsbackup.nbd.listing import list_exports  # these two need libnbd
        from qfsbackup.nbd.opening import connected_disks

        options = mounting.options
        chosen = choose(await list_exports(self.name), options)
        exports = [export(name, offer, options) for name, offer in chosen.items()]
        instant = time.time_ns()
        async with connected_disks(exports, mounting, own=options.trim_server_data) as disks:
            yield Snapshot(
                vm=options.vm or vm_name(self.name),
                uuid=None,
                instant=instant,
                disks=tuple(
                    SnapshotDisk(
                        one.disk,
                        one.size,
                        disk,
                        bitmap="reuse" if one.dirty_context else "none",
                        map_name=one.dirty_context or "",
                        details={"export": chosen[one.disk].name},
                    )
                    for one, disk in zip(exports, disks, strict=True)
                ),
                own=options.trim_server_data,
                details={"source": self.name},
            )


def source(text: str) -> UriSource:
    """The server at this URI."""
    return UriSource(text)


def export(name: str, offer: Offer, options: Options) -> Export:
    """What is to be opened. Raises UserError where the server does not offer what is asked for."""
    context = f"{DIRTY_BITMAP}{options.bitmap}" if options.bitmap else None
    if context and context not in offer.contexts:
        raise UserError(
            f"the export {offer.name!r} has no dirty bitmap {options.bitmap!r}",
            f"Its meta contexts are: {', '.join(offer.contexts) or 'none'}.",
        )
    if options.trim_server_data and not offer.can_trim:
        raise UserError(
            f"the server does not let the export {offer.name!r} be trimmed", "Leave trim-server-data out.", EXIT_USAGE
        )
    return Export(name, offer.uri, offer.size, context)


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


def choose(offers: Sequence[Offer], options: Options) -> dict[str, Offer]:
    """The exports that become disks, by the disk's name. Raises UserError."""
    named, wanted, excluded = _by_name(offers), options.disks, options.exclude
    known = ", ".join(named) or "none"
    for name in (*wanted, *excluded):
        if name not in named:
            raise UserError(f"the NBD server has no disk {name}", f"Its disks are: {known}.", EXIT_USAGE)
    chosen = {name: offer for name, offer in named.items() if name not in excluded and (not wanted or name in wanted)}
    if not chosen:
        raise UserError("every disk of the NBD server is excluded", f"Its disks are: {known}.", EXIT_USAGE)
    return chosen
