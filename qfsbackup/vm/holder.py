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

from qfsbackup.errors import UserError
from qfsbackup.mounts import Mount, mounts_seen_by

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
        for pid in _processes(_clients(path)):
            if pid != os.getpid():
                return held_by(pid, path)
    return None


def held_by(pid: int, name: str) -> UserError:
    """What to say where this process has the VM: a mount, a run, another command of ours, or a program of others."""
    words = _command_line(pid)
    command = _our_command(words)
    if command is None:
        program = Path(words[0]).name if words else "a program"
        return UserError(f"{program} (process {pid}) holds the QMP socket {name}", SECOND_SOCKET)
    if command == "run":
        return UserError(
            f"{name} is being backed up: `qfsbackup run` is at work (process {pid})",
            "Wait for its end; `qfsbackup status` shows how far it is.",
        )
    mount = _served(pid, words)
    if mount is None:
        return UserError(f"`qfsbackup {command}` (process {pid}) is at work on {name}", "Wait for its end.")
    if mount.process is not None:
        return UserError(
            f"{name} is already mounted at {mount.mountpoint} by process {pid}, in another mount namespace",
            f"Unmount it there first: nsenter --target {pid} --mount umount {mount.mountpoint}",
        )
    return UserError(
        f"{name} is already mounted at {mount.mountpoint} by process {pid}",
        f"Unmount it first: qfsbackup umount {mount.mountpoint}",
    )


def _served(pid: int, words: list[str]) -> Mount | None:
    """The mount that this process was called to make; asked of the kernel only, for it may be a mount that hangs."""
    with suppress(OSError):
        folder = os.readlink(f"/proc/{pid}/cwd")  # noqa: PTH115  # a path only inside of that process's root
        paths = {os.path.normpath(os.path.join(folder, word)) for word in words}  # noqa: PTH118  # nothing is looked at
        return next((mount for mount in mounts_seen_by(pid) if os.path.normpath(mount.source) in paths), None)
    return None


def _our_command(words: list[str]) -> str | None:
    """`mount` of `python /usr/local/bin/qfsbackup mount ...`; None of any other program's words."""
    for place, word in enumerate(words[:3]):
        if Path(word).name == "mount.qfsbackup":
            return "mount"
        if Path(word).name == "qfsbackup":
            return next((word for word in words[place + 1 :] if not word.startswith("-")), "mount")
    return None


def _command_line(pid: int) -> list[str]:
    with suppress(OSError):
        return [os.fsdecode(word) for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") if word]
    return []


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
            if any(os.readlink(entry) in wanted for entry in folder.iterdir()):  # noqa: PTH115  # no paths
                yield int(folder.parent.name)
