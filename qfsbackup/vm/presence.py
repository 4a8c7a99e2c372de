# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether there is a QEMU at all; for the supervisor too, so nothing heavy is imported here."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path


def listens(path: str | os.PathLike[str]) -> bool:
    """Is anybody there behind this unix socket? A full queue counts: QEMU may hang."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            return True
    return True


def is_off(path: str | os.PathLike[str]) -> bool:
    """Is this a VM that does not run: no file, or a socket that QEMU has left?"""
    return not Path(path).exists() or (Path(path).is_socket() and not listens(path))


def domain_processes(name: str) -> list[int]:
    """The processes that libvirt called as the QEMU of a domain of this name."""
    guest = b"\0-name\0guest=" + os.fsencode(name.replace(",", ",,"))
    return processes_with(guest + b",", guest + b"\0")


def processes_with(*arguments: bytes) -> list[int]:
    """The processes that have one of these in their command line, whose arguments end with a zero."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (entry / "cmdline").read_bytes()
            found += [int(entry.name)] if any(argument in words for argument in arguments) else []
    return found
