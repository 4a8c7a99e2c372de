# SPDX-License-Identifier: LGPL-2.1-or-later
"""A libnbd handle from its creation through the handshake to its goodbye; the only import of libnbd.

The handshake runs in a thread: libnbd resolves host names blocking, and only its blocking calls say why a server closed
the connection in good order, which is how it refuses TLS or an export. From then on the handle belongs to trio.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import trio

from qfsbackup.errors import EXIT_SYSTEM, UserError
from qfsbackup.patience import NoAnswerError, in_time

try:
    import nbd as libnbd
except ModuleNotFoundError as missing:
    raise UserError(
        "the Python module of libnbd is missing",
        "Install the package python3-libnbd; a virtual environment needs --system-site-packages.",
        EXIT_SYSTEM,
    ) from missing

__all__ = ["Handle", "Handles", "handles", "handshake", "libnbd", "new_handle", "where"]

CONNECT_TIMEOUT = 30.0  # seconds for connecting, TLS and the handshake together
CLOSE_TIMEOUT = 1.0  # seconds for telling the server goodbye

# libnbd ships no type information.
Handle = Any
T = TypeVar("T")


class Handles:
    """Connected handles. Only `handles` makes one."""

    def __init__(self) -> None:
        self._connected: list[Handle] = []

    async def connect(self, uri: str, configure: Callable[[Handle], None], seconds: float = CONNECT_TIMEOUT) -> Handle:
        """One that is connected to `uri`; `configure` is called before it connects.

        Raises UserError where there is no server, no such export, or no agreement with it in time.
        """

        def connect() -> Handle:
            handle = new_handle()
            configure(handle)
            handle.connect_uri(uri)
            return handle

        handle = await handshake(uri, connect, seconds)
        self._connected.append(handle)
        return handle

    async def say_goodbye(self) -> None:
        """To all servers at once."""
        async with trio.open_nursery() as nursery:
            for handle in self._connected:
                nursery.start_soon(_say_goodbye, handle)


@asynccontextmanager
async def handles() -> AsyncIterator[Handles]:
    """Handles that connect while the block lasts, and say goodbye together at its end."""
    connected = Handles()
    try:
        yield connected
    finally:
        with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
            await connected.say_goodbye()


def new_handle() -> Handle:
    """A handle that takes any URI the user may write."""
    handle = libnbd.NBD()
    handle.set_uri_allow_local_file(True)  # the user's own certificates
    return handle


async def handshake(uri: str, blocking: Callable[[], T], seconds: float = CONNECT_TIMEOUT) -> T:
    """Run `blocking`, which talks to the server of `uri`, in a thread and with a deadline. Raises UserError."""
    try:
        return await in_time(blocking, seconds)
    except libnbd.Error as error:
        raise refused(uri, error) from error
    except NoAnswerError as error:
        raise UserError(
            f"{where(uri)} does not answer the NBD handshake within {seconds:.0f} s",
            "See whether the server is alive, and whether it speaks NBD.",
        ) from error


async def _say_goodbye(handle: Handle) -> None:
    """Leave in the way the protocol has it, so that no server logs an accident."""
    try:
        handle.aio_disconnect()
        while not (handle.aio_is_closed() or handle.aio_is_dead()):
            if handle.aio_get_direction() & libnbd.AIO_DIRECTION_WRITE:
                await trio.lowlevel.wait_writable(handle.aio_get_fd())
            else:
                await trio.lowlevel.wait_readable(handle.aio_get_fd())
            handle.poll(0)
    except libnbd.Error:
        return  # it is gone already


def where(uri: str) -> str:
    """The server of an NBD URI as a person would say it."""
    parts = urlsplit(uri)
    socket = parse_qs(parts.query).get("socket")
    return f"the NBD server at {socket[0] if socket else parts.netloc or uri}"


def refused(uri: str, error: libnbd.Error) -> UserError:
    """What a failed connection or handshake means to the person who asked for it."""
    server, text = where(uri), error.string.partition(": ")[2] or error.string
    if text.startswith("connect: "):
        return _unreachable(server, text, error.errnum)
    if "getaddrinfo" in text:
        return UserError(f"{server} has no address", f"Check the host's name in the URI: {text}.")
    if "tls" in text.lower():
        return UserError(
            f"{server} and this client do not agree on TLS",
            f"nbds:// and nbds+unix:// ask for TLS, tls-certificates= names a folder of certificates: {text}.",
        )
    hung_up = error.errnum in (errno.ECONNRESET, errno.EPIPE) or "external event" in text  # before libnbd looked
    if hung_up or "NBD magic" in text or "disconnected unexpectedly" in text:
        return UserError(f"{server} does not speak NBD, or has no room for a client", f"Check the address: {text}.")
    if "URI" in text:
        return UserError(
            f"{uri} is not an NBD URI", f"It looks like nbd://HOST/EXPORT or nbd+unix:///EXPORT?socket=PATH: {text}."
        )
    name = unquote(urlsplit(uri).path.removeprefix("/"))
    return UserError(f"{server} does not give access to its export {name!r}", f"Check the export's name: {text}.")


def _unreachable(server: str, text: str, number: int) -> UserError:
    hints = {
        errno.ENOENT: "There is no such socket: check the path, and that the server runs.",
        errno.ECONNREFUSED: "Nobody listens there: check the address, and that the server runs.",
        errno.EACCES: "Run as root, or as the owner of the socket.",
    }
    return UserError(f"{server} cannot be reached", hints.get(number, f"Check the address and the network: {text}."))
