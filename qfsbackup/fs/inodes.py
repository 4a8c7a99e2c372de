# SPDX-License-Identifier: LGPL-2.1-or-later
"""Inodes. Backup tools recognise a file by its inode, so it is a function of what the file is and never of the order in
which somebody looked it up:

    bits 63..40  number of the disk + 1, or of the VM where there is one, else 0
    bits 39..32  kind of file
    bits 31..0   number within its kind
"""

from __future__ import annotations

from enum import IntEnum

ROOT_INODE = 1  # FUSE's


class Kind(IntEnum):
    """Kinds of files; the values are part of the inodes, so they never change."""

    TOP = 0
    CONFIG = 1
    IMAGE = 2
    MAP = 3
    DELTA = 4
    CHUNK = 5
    CHUNK_FOLDER = 6


class Top(IntEnum):
    """What there is once in a mount: numbers within Kind.TOP."""

    ROOT = ROOT_INODE
    IMAGES = 2
    MAPS = 3
    CONFIG = 4
    SERVICE = 5
    STATUS = 6
    DESCRIPTION = 7
    CHUNKS = 8
    DELTA = 9
    CONTROL = 10


def inode(kind: Kind, disk: int | None, number: int) -> int:
    """The inode of file `number` of its kind; `disk` is the number of what it belongs to, None for nothing."""
    return (0 if disk is None else disk + 1) << 40 | kind << 32 | number


def parts(inode: int) -> tuple[int | None, int, int]:
    """The disk's number, the kind and the number of a file with this inode."""
    disk = inode >> 40
    return disk - 1 if disk else None, inode >> 32 & 0xFF, inode & 0xFFFFFFFF


def is_chunk(inode: int) -> bool:
    """Is this a chunk's inode?"""
    return inode >> 32 & 0xFF == Kind.CHUNK
