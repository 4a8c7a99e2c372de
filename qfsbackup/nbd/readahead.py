# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who reads a disk in sequence, and what they will want next.

A reader is known by where its last read ended, or by where there is data again behind that. The second read that
starts there makes it sequential: from then on blocks are fetched ahead of it, up to its window, which doubles with
every block it used up:

    disk   ======.......=========================.........
               ^next                 ^ahead
               |--------window-------|
           [ block ][(hole) block ][ block ]          a block never crosses a multiple of BLOCK

A block holds what is data in its range; nothing is fetched for a hole, nor of what was trimmed. It is let go when all
of it was handed out, when its reader has gone on without it, or when the budget needs it.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from qfsbackup.facts import CLUSTER
from qfsbackup.nbd.budget import Budget
from qfsbackup.nbd.fetch import Fetch
from qfsbackup.nbd.pool import Pool
from qfsbackup.ranges import RangeSet

BLOCK = 1 << 20  # bytes; the largest read the kernel sends, so that it is answered from one block without a copy
PAGE = CLUSTER  # a block begins on a multiple of it; no server's minimum block is larger (NBD protocol)
FIRST_WINDOW = 128 * 1024  # bytes
READERS = 64  # positions that are remembered
BEHIND = 4 * BLOCK  # how far a reader leaves a block behind before it is let go: reads may overtake each other
FAR = 64 * BLOCK  # how far over holes a reader is looked ahead


class Reader:
    """One sequence of reads."""

    __slots__ = ("ahead", "blocks", "next", "window")

    def __init__(self, position: int) -> None:
        self.next = position
        self.ahead = position
        self.window = 0
        self.blocks: list[Block] = []


class Block:
    """A fetch that was not asked for yet."""

    __slots__ = ("fetch", "left", "reader")

    def __init__(self, fetch: Fetch, reader: Reader, data: int) -> None:
        """`data`: how many bytes of it are no holes."""
        self.fetch = fetch
        self.left = data  # bytes of it that nobody has taken
        self.reader = reader


class Readahead:
    """What is fetched ahead on one disk."""

    def __init__(self, pool: Pool, data: RangeSet, size: int, budget: Budget, wanted: RangeSet) -> None:
        """`data` may shrink while this is used; `close` says so. Nobody is looked ahead over the ends of `wanted`."""
        self._pool = pool
        self._data = data
        self._size = size
        self._budget = budget
        self._kept_to = wanted
        self._readers: OrderedDict[int, Reader] = OrderedDict()  # by what they want next, the longest idle first
        self._cells: dict[int, list[Block]] = {}  # by start // BLOCK

    def blocks(self, start: int, end: int) -> list[Block]:
        """The blocks that hold something of `[start, end)`, in order."""
        if not self._cells:
            return []
        found = [
            block
            for cell in range(start // BLOCK, (end - 1) // BLOCK + 1)
            for block in self._cells.get(cell, ())
            if block.fetch.start < end and start < block.fetch.end
        ]
        return sorted(found, key=_start) if len(found) > 1 else found

    def take(self, block: Block, start: int, end: int) -> None:
        """A reader was given `[start, end)`, which lies in the block."""
        block.left -= self._data.total_within(start, end)
        if block.left <= 0:
            block.reader.window *= 2
            self._let_go(block)

    def failed(self, block: Block) -> None:
        """Its bytes did not come: forget it, and start again slowly."""
        block.reader.window = 0
        self._let_go(block)

    def advance(self, start: int, end: int, hit: Block | None) -> None:
        """Somebody reads `[start, end)`, and found `hit` there. Fetches what comes next, if that is to be expected."""
        reader = self._readers.pop(self._wanted(start), None)
        if reader is None and hit:
            reader = self._readers.pop(self._wanted(hit.reader.next), hit.reader)
        if reader is None:
            self._remember(Reader(end))
            return
        reader.next = max(reader.next, end)
        self._remember(reader)
        reader.window = max(reader.window, FIRST_WINDOW, 2 * (end - start))
        self._budget.touch(reader, partial(self._drop, reader))
        self._leave_behind(reader)
        self._fetch_ahead(reader)

    def close(self, start: int, end: int) -> None:
        """Forget what was fetched from `[start, end)`."""
        for block in self.blocks(start, end):
            self._let_go(block)

    def drop_all(self) -> None:
        """Give everything back to the budget."""
        for reader in list(self._readers.values()):
            self._drop(reader)

    def _wanted(self, position: int) -> int:
        """The data at or behind `position`: who skips holes goes on there, and so does who reads them."""
        return self._data.next_inside(position, self._size)

    def _remember(self, reader: Reader) -> None:
        twin = self._readers.pop(self._wanted(reader.next), None)
        if twin:
            self._drop(twin)
        self._readers[self._wanted(reader.next)] = reader
        if len(self._readers) > READERS:
            self._drop(self._readers.popitem(last=False)[1])

    def _leave_behind(self, reader: Reader) -> None:
        while reader.blocks and reader.blocks[0].fetch.end + BEHIND <= reader.next:
            self._let_go(reader.blocks[0])

    def _fetch_ahead(self, reader: Reader) -> None:
        window = min(reader.window, self._budget.window())
        if window < FIRST_WINDOW:
            return
        # Two blocks at least, so that the next one is there before this one is used up.
        unit = min(BLOCK, 1 << (window.bit_length() - 2))
        limit = self._limit(reader.next)
        held = sum(block.fetch.end - block.fetch.start for block in reader.blocks)
        reader.ahead = max(reader.ahead, -(-reader.next // PAGE) * PAGE)
        while held + unit <= window and self._pool.has_room:
            start, end = self._plan(reader.ahead, unit, limit)
            if start >= end:
                return
            reader.ahead = end
            if self.blocks(start, end) or self._pool.is_reading(start, end):
                continue  # somebody's read has overtaken this reader
            if not self._budget.take(end - start):
                reader.ahead = start
                return
            held += end - start
            fetch = Fetch(self._pool, start, end, self._data)
            self._add(Block(fetch, reader, self._data.total_within(start, end)))

    def _limit(self, position: int) -> int:
        """How far a reader that has come to `position` is looked ahead."""
        limit = min(self._size, position + FAR)
        return self._kept_to.next_outside(position - 1, limit) if position - 1 in self._kept_to else limit

    def _plan(self, ahead: int, unit: int, limit: int) -> tuple[int, int]:
        """The next block at or behind `ahead` that has data; empty where there is none before `limit`."""
        wanted = self._data.next_inside(ahead, limit)
        if wanted >= limit:
            return limit, limit
        cell = wanted // unit * unit
        return max(ahead, cell), min(cell + unit, limit)

    def _add(self, block: Block) -> None:
        block.reader.blocks.append(block)
        self._cells.setdefault(block.fetch.start // BLOCK, []).append(block)

    def _let_go(self, block: Block) -> None:
        cell = block.fetch.start // BLOCK
        blocks = self._cells.get(cell, [])
        if block not in blocks:
            return
        blocks.remove(block)
        if not blocks:
            del self._cells[cell]
        block.reader.blocks.remove(block)
        block.fetch.when_over(partial(self._budget.give, block.fetch.end - block.fetch.start))

    def _drop(self, reader: Reader) -> None:
        """Let go all a reader holds, also what has not gone out yet."""
        for block in list(reader.blocks):
            self._let_go(block)
            block.fetch.abandon()
        reader.window = 0
        reader.ahead = reader.next
        self._budget.leave(reader)


def _start(block: Block) -> int:
    return block.fetch.start
