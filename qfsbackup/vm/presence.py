# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether there is a QEMU at all; for the supervisor too, so nothing heavy is imported here."""

from __future__ import annotations

import os
import socket
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
