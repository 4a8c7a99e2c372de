# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rows of the table: what a figure means, and how far ahead of whom we want to be."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from .contenders import CHUNKS, NBDFUSE, QEMU_FUSE, US
from .measure import Sample

NBDCOPY = "nbdcopy"  # begins the names of all its settings
EXT4 = "ext4"


@dataclass(frozen=True)
class Row:
    """`goals`: by what a contender's name begins with, how many times better than it `ours` should be."""

    title: str
    unit: str
    more_is_better: bool = False
    goals: Mapping[str, float] = field(default_factory=dict)
    ours: str = US


ROWS = {
    "sequential-1m": Row("one sequential reader, 1 MiB reads", "MiB/s", True, {QEMU_FUSE: 2, NBDFUSE: 5, NBDCOPY: 0.7}),
    "sequential-128k": Row("one sequential reader, 128 KiB reads", "MiB/s", True),
    "parallel-2": Row("2 sequential readers, 1 MiB reads", "MiB/s", True),
    "parallel-4": Row("4 sequential readers, 1 MiB reads", "MiB/s", True),
    "random-1": Row("random 4 KiB, 1 reader", "IOPS", True, {NBDFUSE: 1.5}),
    "random-4": Row("random 4 KiB, 4 readers", "IOPS", True, {NBDFUSE: 1.5}),
    "sparse-copy": Row("cp --sparse=auto of the sparse disk", "s"),
    "restic-first": Row("restic, first backup of the sparse disk", "s", ours=CHUNKS),
    "restic-unchanged": Row("restic, the same again in a new mount", "s", ours=CHUNKS),
    "restic-changed": Row("restic, 1 % of the data changed", "s", False, {NBDFUSE: 20}, CHUNKS),
    "listing": Row("list and stat all chunks of the full disk, 64 KiB each", "s", False, {EXT4: 0.1}),
    "mount": Row("qfsbackup mount, both disks", "s"),
    "umount": Row("qfsbackup umount", "s"),
    "guest-median": Row("guest's synchronous writes, median", "ms"),
    "guest-p99": Row("guest's synchronous writes, 99th percentile", "ms"),
    "guest-max": Row("guest's synchronous writes, the longest", "ms"),
    "guest-rate": Row("guest's synchronous writes", "per s", True),
    "guest-pause": Row("guest stopped for a snapshot of 4 idle disks", "ms"),
}


class Samples:
    """All that was measured, by row and contender, in the order it came."""

    def __init__(self) -> None:
        self.of: dict[str, dict[str, list[Sample]]] = defaultdict(lambda: defaultdict(list))

    def add(self, row: str, contender: str, sample: Sample) -> None:
        """One run more."""
        self.of[row][contender].append(sample)
        print(f"  {row:18} {contender:20} {sample.value:10.4g} {ROWS[row].unit}", flush=True)
