# SPDX-License-Identifier: LGPL-2.1-or-later
"""One NBD connection: requests go out at once, replies come back to callbacks, and a lost server fails them all.

    submit -> libnbd writes to the socket in the same call
    receive: wait_readable -> receive_now: libnbd reads all there is -> every finished request calls `done`

A request cannot be taken back: its buffer belongs to libnbd, which holds a reference to it, until `done` was called.
`done` is called exactly once, when the context closes at the latest, in the receiving task or inside the submitting
call; it must neither wait nor raise.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial

import trio

from qfsbackup.errors import UserError
from qfsbackup.facts import Sockets
from qfsbackup.nbd.handle import Handle, handles, libnbd, where
from qfsbackup.nbd.inflight import Done
from qfsbackup.tasks import background, finished

MAX_REQUEST = 32 << 20  # what a server takes that names no maximum (NBD protocol, "block size constraints")
MAX_RECV = 32  # before other tasks have their turn

Buffer = bytearray | memoryview


class ConnectionLostError(Exception):
    """The server is gone, or the connection was closed; nothing can be read any more."""


class ServerError(Exception):
    """The server refused one request; the connection goes on."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.errno = number


class Connection:
    """A connected handle. Only `connection()` makes one."""

    def __init__(
        self, handle: Handle, socket: int, on_lost: Callable[[ConnectionLostError], None], sockets: Sockets
    ) -> None:
        self._handle = handle
        self._socket = socket
        self._on_lost = on_lost
        self._sockets = sockets
        sockets[socket] = self.receive_now
        self._waiting: dict[int, Done] = {}
        self._blocked = trio.Event()
        self._lent: Callable[[], bool] = bool
        self.lost: ConnectionLostError | None = None
        self.size: int = handle.get_size()
        self.minimum: int = handle.get_block_size(libnbd.SIZE_MINIMUM) or 1
        self.maximum: int = handle.get_block_size(libnbd.SIZE_MAXIMUM) or MAX_REQUEST
        self.can_trim: bool = handle.can_trim() and not handle.is_read_only()
        self.can_multi_conn: bool = handle.can_multi_conn()

    @property
    def handle(self) -> Handle:
        """For who sends requests of their own, and none by this connection: see `lend`."""
        return self._handle

    def lend(self, receive: Callable[[], bool]) -> None:
        """From now on `receive` is called when there is something to receive; False: see yourself what it is."""
        self._lent = receive

    @property
    def in_flight(self) -> int:
        """How many requests the server has not answered."""
        return len(self._waiting)

    def has_context(self, context: str) -> bool:
        """Was this meta context agreed on."""
        return bool(self._handle.can_meta_context(context))

    def read(self, buffer: Buffer, offset: int, done: Done) -> None:
        """Fill `buffer` from `offset`. Its content is undefined where `done` gets an error."""
        self._submit(self._handle.aio_pread, (buffer, offset), done)

    def trim(self, offset: int, length: int, done: Done) -> None:
        """Discard `[offset, offset + length)`."""
        self._submit(self._handle.aio_trim, (length, offset), done)

    async def block_status(self, offset: int, length: int) -> list[int]:
        """The extents of the one context of this connection: length, flags, length, flags, ... as the server says it.

        They need not reach the end of the range, and may reach beyond it. Raises ServerError, ConnectionLostError.
        """
        extents: list[int] = []

        def extent(_context: str, _offset: int, entries: list[int], _error: object) -> int:
            extents.extend(entries)
            return 0

        await finished(partial(self._submit, self._handle.aio_block_status, (length, offset, extent)))
        return extents

    def _submit(self, command: Callable[..., int], arguments: tuple[object, ...], done: Done) -> None:
        if self.lost:
            done(self.lost)
            return
        try:
            cookie = command(*arguments)
        except libnbd.Error as error:
            if self._is_over():
                self.lose(error.string)
            done(self._explain(error))
            return
        self._waiting[cookie] = done
        if self._handle.aio_get_direction() & libnbd.AIO_DIRECTION_WRITE:
            self.send_later()

    def send_later(self) -> None:
        """The socket has not taken all of a request at once."""
        self._blocked.set()

    def _explain(self, error: libnbd.Error) -> Exception:
        """A dead handle says EINVAL or nothing at all: ask for its state first."""
        if self._is_over():
            return ConnectionLostError(error.string)
        return ServerError(error.errnum or errno.EIO, error.string)

    def _is_over(self) -> bool:
        return bool(self._handle.aio_is_dead() or self._handle.aio_is_closed())

    async def receive(self) -> None:
        """Task: deliver replies until the connection is lost."""
        while not self.lost:
            await trio.lowlevel.wait_readable(self._socket)
            self.receive_now()

    def receive_now(self) -> None:
        """Deliver the replies that are there."""
        if self._lent():
            return
        try:
            self._receive_all()
        except libnbd.Error as error:
            self.lose(error.string)
        else:
            if self._is_over():
                self.lose("the server closed the connection")

    def _receive_all(self) -> None:
        """One poll is one recv(): go on while there is more, a trip through the event loop costs ten times as much."""
        for _ in range(MAX_RECV):
            if self._is_over() or not self._handle.poll(0):
                return
            self._deliver()
            if not self._waiting:
                return

    def _deliver(self) -> None:
        handle = self._handle
        while self._waiting and (cookie := handle.aio_peek_command_completed()):
            done = self._waiting.pop(cookie)
            try:
                handle.aio_command_completed(cookie)
            except libnbd.Error as error:
                done(self._explain(error))
            else:
                done(None)

    def lose(self, reason: str) -> None:
        """Fail all requests, now and from now on."""
        if self.lost:
            return
        self.lost = ConnectionLostError(reason)
        del self._sockets[self._socket]
        self._on_lost(self.lost)
        waiting, self._waiting = self._waiting, {}
        for done in waiting.values():
            done(self.lost)

    async def send_blocked(self) -> None:
        """Task: send on what the socket did not take at once; rare, a request is 28 bytes."""
        while True:
            await self._blocked.wait()
            self._blocked = trio.Event()
            while not self._is_over() and self._handle.aio_get_direction() & libnbd.AIO_DIRECTION_WRITE:
                await trio.lowlevel.wait_writable(self._socket)
                self._handle.poll(0)


@contextmanager
def _duplicate(descriptor: int) -> Iterator[int]:
    duplicate = os.dup(descriptor)
    try:
        yield duplicate
    finally:
        os.close(duplicate)


def _nothing(_error: ConnectionLostError) -> None:
    pass


def configure(handle: Handle, meta_contexts: Sequence[str] = ()) -> None:
    """Before it connects.

    Structured replies are asked for with meta contexts only: with them QEMU's server answers a read by block status
    first, and drops the connection when the read then fails (nbd/server.c nbd_co_send_sparse_read).
    """
    handle.set_pread_initialize(False)  # nobody looks into the buffer of a failed read
    handle.set_request_structured_replies(bool(meta_contexts))
    for context in meta_contexts:
        handle.add_meta_context(context)


@asynccontextmanager
async def attached(
    handle: Handle, uri: str, size: int, on_lost: Callable[[ConnectionLostError], None], sockets: Sockets
) -> AsyncIterator[Connection]:
    """The connection of a handle to `uri`, an export of `size` bytes; its descriptor stands in `sockets` while it is
    not lost.

    `on_lost` is called once, before the requests fail: the server went away, or the block ended. Raises UserError where
    the export has another size.
    """
    if handle.get_size() != size:
        raise UserError(
            f"{where(uri)} offers a disk of {handle.get_size()} bytes, where one of {size} is expected",
            "See whether the disk was just resized, and whether the URI names the right export.",
        )
    # libnbd closes its descriptor when the handle dies, inside any call; no task may wait for a number then reused.
    with _duplicate(handle.aio_get_fd()) as socket:
        opened = Connection(handle, socket, on_lost, sockets)
        async with background(opened.receive, opened.send_blocked):
            try:
                yield opened
            finally:
                opened.lose("the connection was closed")


@asynccontextmanager
async def connection(uri: str, size: int, meta_contexts: Sequence[str]) -> AsyncIterator[Connection]:
    """Connect to `uri`, an export of `size` bytes, by a handle of its own. Raises UserError where that cannot be."""
    async with handles() as own:
        handle = await own.connect(uri, partial(configure, meta_contexts=meta_contexts))
        async with attached(handle, uri, size, _nothing, {}) as opened:
            yield opened
