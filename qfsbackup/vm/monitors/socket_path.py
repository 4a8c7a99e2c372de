# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connecting to a unix socket by its path, and what to say where something else stands there."""

from __future__ import annotations

import errno
import socket
import stat
from contextlib import suppress
from itertools import islice
from pathlib import Path

from qfsbackup.errors import UserError
from qfsbackup.vm.monitors.holder import SECOND_SOCKET, held

HINTS = {
    errno.ENOENT: "Is the VM running, and was it started with -qmp unix:PATH,server=on,wait=off?",
    errno.ENOTDIR: "Is the path right?",
    errno.ECONNREFUSED: "Nobody listens there: is the VM running, and is this its QMP socket?",
    errno.EACCES: "Run as root, or as the user who may write to that socket.",
    errno.EPERM: "Run as root, or as the user who may write to that socket.",
    errno.EAGAIN: SECOND_SOCKET,
    errno.EPROTOTYPE: "It is a socket of another type; name the VM's QMP socket.",
    None: "A socket's path may have 107 bytes; use a shorter one, perhaps by a symbolic link.",
}
SHOWN = 3  # sockets that are named of a folder


def open_socket(name: str) -> socket.socket:
    """A connection to the QMP socket, not blocking. Raises UserError."""
    plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    plain.setblocking(False)  # a full backlog is an error at once (EAGAIN), not a wait
    try:
        plain.connect(name)
    except OSError as error:
        plain.close()
        busy = held(name) if error.errno == errno.EAGAIN else None
        raise busy or _no_socket(Path(name)) or _connect_error(name, error) from error
    return plain


def _connect_error(name: str, error: OSError) -> UserError:
    reason = "it is busy" if error.errno == errno.EAGAIN else error.strerror or str(error)
    return UserError(
        f"cannot connect to the QMP socket {name}: {reason}",
        HINTS.get(error.errno, "Name the VM's QMP socket."),
    )


def _no_socket(path: Path) -> UserError | None:
    """What stands there, if it is anything but a socket."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return None
    if stat.S_ISDIR(mode):
        return UserError(f"{path} is a folder, not a VM's QMP socket", _sockets_in(path))
    if not stat.S_ISSOCK(mode):
        return UserError(f"{path} is a file, not a VM's QMP socket", HINTS[errno.ENOENT])
    return None


def _sockets_in(folder: Path) -> str:
    found: list[str] = []
    with suppress(OSError):
        found = sorted(islice((str(path) for path in folder.iterdir() if path.is_socket()), SHOWN))
    return f"The sockets in it: {', '.join(found)}" if found else "Name the socket itself."
