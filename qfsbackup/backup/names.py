# SPDX-License-Identifier: LGPL-2.1-or-later
"""File names of disks and of their chunks. A disk's name comes from QEMU or an NBD server and may hold anything."""

from __future__ import annotations

import hashlib
from urllib.parse import quote

LONGEST = 200  # bytes; NAME_MAX is 255, and a suffix follows
A_FOLDER = 256  # chunks


def file_name(name: str) -> str:
    """`name` with everything but letters, digits and `_.-~+@:=,` percent-encoded; different names stay different.

    Where that is longer than 200 bytes, its end gives way to a hash of the whole. Never empty, never `.` or `..`.
    """
    quoted = quote(name.encode("utf-8", "surrogatepass"), safe="+@:=,")
    if quoted.startswith("."):
        quoted = "%2E" + quoted[1:]
    if len(quoted) > LONGEST:
        digest = hashlib.sha256(quoted.encode()).hexdigest()
        quoted = f"{quoted[: LONGEST - len(digest) - 1]}~{digest}"
    return quoted or "%"  # which quoting never gives


def chunk_path(number: int) -> str:
    """Where chunk `number` is below the disk's folder."""
    return f"{number // A_FOLDER:03}/{number:08}"
