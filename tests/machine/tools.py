# SPDX-License-Identifier: LGPL-2.1-or-later
"""What backup tools keep that skip unchanged files, by the rules of rsync, restic and tar --listed-incremental."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

SECOND = 10**9


def rsync(stat: os.stat_result) -> tuple[int, ...]:
    """What must be as it was for rsync to skip a file: size and time of change, in whole seconds."""
    return stat.st_size, stat.st_mtime_ns // SECOND


def restic(stat: os.stat_result) -> tuple[int, ...]:
    """The same for restic."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


@dataclass
class Copy:
    """One tool's backup of `chunks/`: content by path, and what it saw of the file when it read it."""

    rule: Callable[[os.stat_result], tuple[int, ...]]
    seen: dict[str, tuple[int, ...]] = field(default_factory=dict)
    held: dict[str, bytes] = field(default_factory=dict)
    started: int = 0  # when its last whole run began, in nanoseconds since the epoch

    @property
    def name(self) -> str:
        return self.rule.__name__

    def wants(self, path: str, stat: os.stat_result) -> bool:
        """Would it read the file."""
        return self.seen.get(path) != self.rule(stat)

    def take(self, path: str, stat: os.stat_result, content: bytes) -> None:
        """It has read it."""
        self.seen[path], self.held[path] = self.rule(stat), content

    def end(self, started: int, paths: set[str]) -> None:
        """A run that began at `started` was a whole one. What is gone from the tree goes from the copy (--delete)."""
        self.started = started
        for path in self.held.keys() - paths:
            del self.held[path], self.seen[path]

    def disks(self) -> Mapping[str, bytes]:
        """What `qfsbackup restore` would make of it, by the disk's name."""
        parts: dict[str, list[bytes]] = {}
        for path in sorted(self.held):
            parts.setdefault(path.split("/")[0], []).append(self.held[path])
        return {name: b"".join(pieces) for name, pieces in parts.items()}


def nothing(_stat: os.stat_result) -> tuple[int, ...]:
    """What tar remembers of a file."""
    return ()


class Tar(Copy):
    """tar skips a file that it has and that was not changed since its last whole run began, by its own clock."""

    def __init__(self) -> None:
        super().__init__(nothing)

    @property
    def name(self) -> str:
        return "tar"

    def wants(self, path: str, stat: os.stat_result) -> bool:
        return path not in self.held or max(stat.st_mtime_ns, stat.st_ctime_ns) >= self.started


class Tools:
    """The copies of one target, one for each rule. A file is read once for all that want it."""

    def __init__(self) -> None:
        self.copies = [Copy(rsync), Copy(restic), Tar()]
        self.read = 0  # files, ever

    def take(self, chunks: Path, now: int, last: int | None = None) -> None:
        """Back up `chunks`; with `last`, end after so many files. Raises OSError where one cannot be read.

        `now` is in nanoseconds since the epoch.
        """
        paths = sorted(str(path.relative_to(chunks)) for path in chunks.glob("*/*/*"))
        for path in paths[:last]:
            stat = (chunks / path).stat()
            wanting = [copy for copy in self.copies if copy.wants(path, stat)]
            if not wanting:
                continue
            content = (chunks / path).read_bytes()
            self.read += 1
            for copy in wanting:
                copy.take(path, stat, content)
        if last is None:
            for copy in self.copies:
                copy.end(now, set(paths))
