# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an NBD server offers: its exports, their sizes and meta contexts, asked for on a connection that opens none."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial
from urllib.parse import quote, unquote, urlsplit

from qfsbackup.errors import UserError
from qfsbackup.nbd.export import Offer
from qfsbackup.nbd.handle import Handle, handshake, libnbd, new_handle, where


async def list_exports(uri: str) -> list[Offer]:
    """The export that `uri` names; where it names none, every export of the server, in the server's order.

    A server that does not list its exports has its default one. Raises UserError where there is no server, no such
    export, or no agreement.
    """
    return await handshake(uri, partial(_list_exports, uri))


def _list_exports(uri: str) -> list[Offer]:
    wanted = unquote(urlsplit(uri).path.removeprefix("/"))
    names: list[str] = []
    try:
        return _ask(uri, wanted, names)
    except libnbd.Error:
        if names and not wanted:
            raise  # half of what it lists would be a backup that misses disks
    # Not every server knows these options; and a plain connection says what is wrong.
    handle = new_handle()
    try:
        handle.connect_uri(uri)
    except libnbd.Error as error:
        if not names:
            raise
        known = ", ".join(name or "(the default one)" for name in names)
        raise UserError(f"{where(uri)} has no export {wanted!r}", f"Its exports are: {known}.") from error
    offer = _offer(handle, uri, wanted)
    handle.shutdown()
    return [offer]


def _ask(uri: str, wanted: str, names: list[str]) -> list[Offer]:
    """What the server says of the wanted exports; `names` gets all that it lists."""
    handle = new_handle()
    handle.set_opt_mode(True)
    handle.connect_uri(uri)
    with suppress(libnbd.Error):  # a server need not tell
        handle.opt_list(lambda name, _description: names.append(name))
    offers = [_describe(handle, uri, name) for name in ([wanted] if wanted else names or [""])]
    handle.opt_abort()
    return offers


def _describe(handle: Handle, uri: str, name: str) -> Offer:
    handle.set_export_name(name)
    handle.opt_info()
    offer = _offer(handle, uri, name)
    contexts: list[str] = []
    with suppress(libnbd.Error):  # nor have any
        handle.opt_list_meta_context(contexts.append)
    return replace(offer, contexts=tuple(contexts))


def _offer(handle: Handle, uri: str, name: str) -> Offer:
    trims = handle.can_trim() and not handle.is_read_only()
    return Offer(name, _with_name(uri, name), handle.get_size(), bool(trims), contexts=())


def _with_name(uri: str, name: str) -> str:
    parts = urlsplit(uri)
    # urlunsplit() would drop the slashes before an empty host.
    return f"{parts.scheme}://{parts.netloc}/{quote(name, safe='')}" + (f"?{parts.query}" if parts.query else "")
