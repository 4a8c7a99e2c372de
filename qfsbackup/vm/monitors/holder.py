# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who has a QMP socket that serves one client at a time: asked of the kernel, for QEMU does not tell.

sock_diag(7) names both ends of each connection by their inodes, /proc/PID/fd whose they are.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from qfsbackup.at_work import held_by, our_command
from qfsbackup.errors import UserError

SECOND_SOCKET = (
    "Give the VM one more QMP socket for backups (-qmp unix:/run/vm/NAME.qmp,server=on,wait=off):"
    " a QMP socket serves one client at a time."
)

# linux/sock_diag.h, linux/unix_diag.h
NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, NLM_F_DUMP, NLMSG_ERROR, NLMSG_DONE = 4, 20, 1, 0x300, 2, 3
SHOW_VFS, SHOW_PEER = 2, 4
ATTRIBUTE_VFS, ATTRIBUTE_PEER = 1, 2
ESTABLISHED = 1

Attributes = dict[int, bytes]


def held(path: str) -> UserError | None:
    """Why the server of this unix socket has no time: who is its client now. None where nobody can be found."""
    with suppress(OSError):
        pid = next((pid for pid in _processes(_clients(path)) if pid != os.getpid()), None)
        if pid is not None and our_command(pid):
            return held_by(pid, path)
        if pid is not None:
            program = Path(f"/proc/{pid}/comm").read_text().rstrip()
            return UserError(f"{program} (process {pid}) holds the QMP socket {path}", SECOND_SOCKET)
    return None


def _clients(path: str) -> set[int]:
    """The inodes of the sockets that are connected to the one at this path, and were accepted."""
    status = Path(path).stat()
    wanted = struct.pack("=II", status.st_ino & 0xFFFFFFFF, os.major(status.st_dev) << 20 | os.minor(status.st_dev))
    return {
        struct.unpack("=I", attributes[ATTRIBUTE_PEER])[0]
        for inode, state, attributes in _unix_sockets()
        if inode and state == ESTABLISHED and attributes.get(ATTRIBUTE_VFS) == wanted and ATTRIBUTE_PEER in attributes
    }


def _unix_sockets() -> Iterator[tuple[int, int, Attributes]]:
    """Inode (0 before it is accepted), state and attributes of every unix socket in this network namespace."""
    every, cookie = 0xFFFFFFFF, 0xFFFFFFFF
    request = struct.pack("=BBHIIIII", socket.AF_UNIX, 0, 0, every, 0, SHOW_VFS | SHOW_PEER, cookie, cookie)
    header = struct.pack("=IHHII", 16 + len(request), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as kernel:
        kernel.settimeout(1.0)
        kernel.send(header + request)
        while True:
            for kind, body in _messages(kernel.recv(1 << 16)):
                if kind in (NLMSG_DONE, NLMSG_ERROR):
                    return
                _family, _type, state, inode = struct.unpack_from("=BBBxI", body)
                yield inode, state, _attributes(body[16:])


def _messages(block: bytes) -> Iterator[tuple[int, bytes]]:
    while len(block) >= 16:
        length, kind = struct.unpack_from("=IH", block)
        yield kind, block[16:length]
        block = block[(length + 3) & ~3 :]


def _attributes(block: bytes) -> Attributes:
    found = {}
    while len(block) >= 4:
        length, kind = struct.unpack_from("=HH", block)
        found[kind] = block[4:length]
        block = block[(length + 3) & ~3 :]
    return found


def _processes(inodes: set[int]) -> Iterator[int]:
    """Those who have one of these sockets open, as far as we may look."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    if not wanted:
        return
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with suppress(OSError):
            if not wanted.isdisjoint(map(_link, folder.iterdir())):
                yield int(folder.parent.name)


def _link(entry: Path) -> str:
    """What a descriptor leads to; empty where it was closed meanwhile."""
    with suppress(FileNotFoundError):
        return os.readlink(entry)  # noqa: PTH115  # it is no path
    return ""
