# SPDX-License-Identifier: LGPL-2.1-or-later
"""What of a disk's chunks is data, by the holes of their files.

Only those are opened that take up less than they are long: opening 65,536 files takes a second on tmpfs, but 25 s below
`restic mount` (restic 0.14), where each is said to be full, and where there are no holes to be found.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from qfsbackup.backup.chunk_set import ChunkSet
from qfsbackup.backup.names import chunk_path
from qfsbackup.facts import CLUSTER
from qfsbackup.ranges import RangeSet


def data_of(chunks: ChunkSet) -> RangeSet:
    """What is not known to be zero, in whole clusters of 64 KiB. Raises OSError."""
    data, position = RangeSet(), 0
    for number in chunks.sparse:
        start = number * chunks.chunk
        data.add(position, start)
        position = min(start + chunks.chunk, chunks.size)
        for first, last in _extents(chunks.folder / chunk_path(number), position - start):
            data.add(start + first, start + last)
    data.add(position, chunks.size)
    return data


def _extents(path: Path, size: int) -> Iterator[tuple[int, int]]:
    descriptor, end = os.open(path, os.O_RDONLY), 0
    try:
        while end < size:
            start = max(os.lseek(descriptor, end, os.SEEK_DATA) // CLUSTER * CLUSTER, end)
            end = min(-(-os.lseek(descriptor, start, os.SEEK_HOLE) // CLUSTER) * CLUSTER, size)
            yield start, end
    except OSError as error:
        if error.errno != errno.ENXIO:  # no data behind
            raise
    finally:
        os.close(descriptor)
