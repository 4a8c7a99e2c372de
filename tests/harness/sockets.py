# SPDX-License-Identifier: LGPL-2.1-or-later
"""Listening unix sockets that are handed to a server as file descriptors."""

import contextlib
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path


@contextlib.contextmanager
def listening(paths: Iterable[Path]) -> Iterator[list[socket.socket]]:
    """A listening socket for each path. Ours are closed at the end of the block, so that when the server that
    inherited them dies, the connections that it never accepted end too."""
    with contextlib.ExitStack() as stack:
        sockets = []
        for path in paths:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.bind(str(path))
            sock.listen()
            sockets.append(sock)
        yield sockets
