# SPDX-License-Identifier: LGPL-2.1-or-later
"""The parties of the incremental model: a tool that skips files it takes for unchanged, and the mount it reads."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from qfsbackup.contracts import awaited
from qfsbackup.fs.grid import Grid
from qfsbackup.fs.node import Attributes, Directory, File, Node
from qfsbackup.fs.tree import Tree

SECOND = 10**9
CHUNK = 64 << 10
LARGEST = 5 * CHUNK  # bytes of the disk

Key = tuple[int, ...]


@dataclass
class Tool:
    """Reads a file again if its attributes are others than they were when it read it last.

    restic and borg look at all of them; rsync at size and whole seconds of mtime.
    """

    whole: bool
    held: dict[str, tuple[Key, bytes]] = field(default_factory=dict)
    skipped: int = 0

    def key(self, attributes: Attributes) -> Key:
        if self.whole:
            return attributes.size, attributes.time, attributes.inode
        return attributes.size, attributes.time // SECOND

    async def take(self, path: str, file: File) -> None:
        key = self.key(file.attributes())
        if path in self.held and self.held[path][0] == key:
            self.skipped += 1
            return
        self.held[path] = key, bytes(await awaited(file.open().read, 0, LARGEST))

    def forget_others(self, paths: set[str]) -> None:
        self.held = {path: held for path, held in self.held.items() if path in paths}

    def disk(self) -> bytes:
        return b"".join(content for path, (_, content) in sorted(self.held.items()) if path.startswith("chunks/"))


@dataclass
class Since:
    """Reads a file again if it is newer than the start of its own last run, or was not there: GNU tar, find -newer."""

    started: int = -1
    held: dict[str, bytes] = field(default_factory=dict)

    def run(self, tree: Tree, now: int) -> None:
        files = dict(walk(tree))
        for path, file in files.items():
            if path not in self.held or file.attributes().time > self.started:
                self.held[path] = bytes(trio.run(awaited, file.open().read, 0, LARGEST))
        self.held = {path: self.held[path] for path in files}
        self.started = now

    def disk(self) -> bytes:
        return b"".join(content for path, content in sorted(self.held.items()) if path.startswith("chunks/"))


@dataclass
class Mount:
    """A snapshot and its tree, with the bitmap that began at its instant."""

    target: str
    generation: str
    instant: int
    content: bytes
    grid: Grid
    tree: Tree
    ticks: int  # of its beginning, on a clock that nobody sets back
    read: bool = False
    set_back: bool = False  # was the clock set back meanwhile


def walk(folder: Directory, path: str = "") -> list[tuple[str, File]]:
    found: list[tuple[str, File]] = []
    for name, node in folder.entries(0):
        found += walk_node(node, f"{path}{name}")
    return found


def walk_node(node: Node, path: str) -> list[tuple[str, File]]:
    if node.attributes().directory:
        return walk(node, f"{path}/")  # type: ignore[arg-type]  # it says that it is a folder
    return [(path, node)]  # type: ignore[list-item]  # it says that it is a file
