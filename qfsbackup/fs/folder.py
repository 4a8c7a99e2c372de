# SPDX-License-Identifier: LGPL-2.1-or-later
"""A folder whose entries are known when it is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

from qfsbackup.fs.node import Attributes, Node


class Folder:
    """`entries` are listed in their order; `hidden` ones are found by name only."""

    def __init__(
        self, inode: int, time: int, entries: Mapping[str, Node], hidden: Mapping[str, Node] | None = None
    ) -> None:
        self._attributes = Attributes(inode, size=0, blocks=0, time=time, directory=True)
        self._entries = dict(entries)
        self._hidden = dict(hidden or {})

    def attributes(self) -> Attributes:
        return self._attributes

    def lookup(self, name: str) -> Node | None:
        return self._entries.get(name) or self._hidden.get(name)

    def entries(self, start: int) -> Iterator[tuple[str, Node]]:
        return islice(self._entries.items(), start, None)
