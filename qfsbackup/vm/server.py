# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU's NBD server, on a listening socket of ours. A QEMU has one at most, and cannot be asked whether it runs.

The socket is made here and handed over as a descriptor, so QEMU needs no permission on its folder; QEMU unlinks the
path when the server stops.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

from qfsbackup.errors import UserError
from qfsbackup.facts import CONNECTIONS
from qfsbackup.vm.monitor import Monitor, QmpRefusedError
from qfsbackup.vm.node import undoing
from qfsbackup.vm.ours import PREFIX, SOCKET

log = logging.getLogger(__name__)
SPARE = 16  # connections for whoever else looks at the exports
BACKLOG = 16  # connections that wait for QEMU's main loop


@asynccontextmanager
async def nbd_server(qmp: Monitor, listener: socket.socket, exports: int) -> AsyncIterator[None]:
    """An NBD server for so many exports that accepts on `listener`, which is then QEMU's alone.

    Raises UserError where QEMU runs one already, QmpError.
    """
    async with qmp.one_connection():
        await qmp.execute_with_fd("getfd", {"fdname": SOCKET}, listener.fileno())
        await _start(qmp, max(CONNECTIONS, exports) + SPARE)
    listener.close()  # or connecting would still succeed, and then hang, once QEMU is gone
    try:
        yield
    finally:
        await stop_server(qmp)


async def _start(qmp: Monitor, most: int) -> None:
    try:
        address = {"type": "fd", "data": {"str": SOCKET}}
        await qmp.execute("nbd-server-start", {"addr": address, "max-connections": most})
    except QmpRefusedError as error:
        await _forget_socket(qmp)
        raise UserError(
            f"QEMU cannot start its NBD server: {error.desc}",
            "If another backup of this VM is running, wait for its end.",
        ) from error
    except BaseException:
        await stop_server(qmp)  # the answer is lost, so it may be running
        raise


async def stop_server(qmp: Monitor) -> None:
    """End all our exports and the server; if somebody added exports to it meanwhile, leave it to them."""
    with undoing("stop the NBD server"):
        exports = [export["id"] for export in await qmp.execute("query-block-exports")]
        if all(name.startswith(PREFIX) for name in exports):
            await _stop(qmp)
            return
        log.warning("the NBD server is left running: others added exports to it")
        for name in exports:
            if name.startswith(PREFIX):
                await _remove_export(qmp, name)


async def _stop(qmp: Monitor) -> None:
    try:
        await qmp.execute("nbd-server-stop")  # returns when all clients are disconnected
    except QmpRefusedError as error:
        log.debug("no NBD server to stop: %s", error)
    await _forget_socket(qmp)


async def _forget_socket(qmp: Monitor) -> None:
    with undoing("close the NBD socket"), suppress(QmpRefusedError):  # normally the server took it
        await qmp.execute("closefd", {"fdname": SOCKET})


async def _remove_export(qmp: Monitor, name: str) -> None:
    async with qmp.listen("BLOCK_EXPORT_DELETED") as deleted:
        await qmp.execute("block-export-del", {"id": name, "mode": "hard"})
        while (await deleted())["id"] != name:
            pass


@contextmanager
def listening_socket(path: Path) -> Iterator[socket.socket]:
    """A listening unix socket at `path`, of which nothing is left afterwards. Raises UserError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            _remove_stale(path)
            listener.bind(str(path))
        except OSError as error:
            raise UserError(
                f"no NBD socket at {path}: {error.strerror or error}",
                "Is the runtime folder there, and its path short?",
            ) from error
        try:
            listener.listen(BACKLOG)
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    """Remove the socket of a mount that died together with its VM: one that nobody listens on. Raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, suppress(FileNotFoundError):
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
