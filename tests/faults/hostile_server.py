# SPDX-License-Identifier: LGPL-2.1-or-later
"""An NBD server that breaks the protocol, or means harm: a fake, because real ones do neither.

The frame is a correct one (NBD protocol, fixed newstyle); a `Behaviour` says what is wrong in it.
"""

import contextlib
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from qfsbackup.tasks import background
from tests.harness.sockets import listening

MAGIC, OPTION, REPLY = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
ASK, GO, STRUCTURED, LIST_META, SET_META = 6, 7, 8, 9, 10  # options
ACK, INFO, META, UNSUPPORTED = 1, 3, 4, 0x80000001  # replies to options
READ, DISCONNECT, BLOCK_STATUS = 0, 2, 7  # requests
ALLOCATION = b"base:allocation"


@dataclass
class Behaviour:
    """What is wrong. `sizes`: of the export, for each connection in turn, the last for all that follow."""

    greeting: bytes | None = None  # instead of the protocol
    sizes: list[int] = field(default_factory=lambda: [1 << 20])
    extents: bytes | None = None  # the descriptors of each block status reply: pairs of length and flags, 32 bits each
    read: bytes | None = None  # instead of the reply to a read; empty: the connection is closed


@contextlib.asynccontextmanager
async def hostile(path: Path, behaviour: Behaviour) -> AsyncIterator[str]:
    """Serve on the unix socket `path`; yields the URI."""
    with listening([path]) as [listener]:
        listener.setblocking(False)
        async with trio.open_nursery() as nursery:
            async with background(partial(_accept, listener, behaviour, nursery)):
                yield f"nbd+unix:///disk?socket={path}"
            nursery.cancel_scope.cancel()


async def _accept(listener: object, behaviour: Behaviour, nursery: trio.Nursery) -> None:
    accepting = trio.socket.from_stdlib_socket(listener)  # type: ignore[arg-type]  # the harness gives a plain socket
    while True:
        client, _ = await accepting.accept()
        nursery.start_soon(_serve, trio.SocketStream(client), behaviour)


async def _serve(stream: trio.SocketStream, behaviour: Behaviour) -> None:
    with contextlib.suppress(EOFError, trio.BrokenResourceError):
        async with stream:
            if behaviour.greeting is not None:
                await stream.send_all(behaviour.greeting)
                return
            await _negotiate(stream, behaviour)
            while True:
                await _answer(stream, behaviour)


async def _take(stream: trio.SocketStream, form: str) -> tuple[int, ...]:
    data = b""
    while len(data) < struct.calcsize(form):
        more = await stream.receive_some(struct.calcsize(form) - len(data))
        if not more:
            raise EOFError
        data += more
    return struct.unpack(form, data)


async def _negotiate(stream: trio.SocketStream, behaviour: Behaviour) -> None:
    await stream.send_all(struct.pack(">QQH", MAGIC, OPTION, 3))
    await _take(stream, ">I")
    while True:
        _, option, length = await _take(stream, ">QII")
        content = bytes(await _take(stream, f">{length}B"))

        async def reply(kind: int, data: bytes = b"", option: int = option) -> None:
            await stream.send_all(struct.pack(">QIII", REPLY, option, kind, len(data)) + data)

        if option in (ASK, GO):
            size = behaviour.sizes.pop(0) if len(behaviour.sizes) > 1 else behaviour.sizes[0]
            await reply(INFO, struct.pack(">HQH", 0, size, 1))
            await reply(ACK)
            if option == GO:
                return
        elif option == STRUCTURED:
            await reply(ACK)
        elif option in (LIST_META, SET_META):
            if ALLOCATION in content:
                await reply(META, struct.pack(">I", 1) + ALLOCATION)
            await reply(ACK)
        else:
            await reply(UNSUPPORTED)


async def _answer(stream: trio.SocketStream, behaviour: Behaviour) -> None:
    _, _, kind, cookie, _, length = await _take(stream, ">IHHQQI")
    if kind == DISCONNECT:
        raise EOFError
    if kind == BLOCK_STATUS:
        extents = behaviour.extents if behaviour.extents is not None else struct.pack(">II", length, 0)
        # A structured reply, the last chunk, of type NBD_REPLY_TYPE_BLOCK_STATUS.
        head = struct.pack(">IHHQI", 0x668E33EF, 1, 5, cookie, 4 + len(extents))
        await stream.send_all(head + struct.pack(">I", 1) + extents)
    elif kind == READ and behaviour.read == b"":
        raise EOFError
    elif kind == READ:
        answer = behaviour.read or struct.pack(">IIQ", 0x67446698, 0, cookie) + bytes(length)
        await stream.send_all(answer)
