# SPDX-License-Identifier: LGPL-2.1-or-later
"""The smallest size that a disk had since an instant: QEMU's bitmaps do not record what a resize cuts off or adds.

    the disk at the instant   |------------------|  beside the recording bitmap one more, all set, that records nothing
    shrunk                    |-------|             its bits behind the end are gone
    grown again               |-------|----------|  and stay away: what is left of it is the low-water mark

From the mark on everything counts as dirty. A cut of less than a cluster, in the disk's last one, leaves no trace.

QEMU has no command that sets bits. So a node without data, of the disk's size, gets a bitmap with the coarsest
granularity there is, and one write for each of its bits; merged into a bitmap of the disk, it sets all of them.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from qfsbackup.vm.monitor import Monitor
from qfsbackup.vm.node import node
from qfsbackup.vm.ours import LOW_WATER

log = logging.getLogger(__name__)

COARSE = 1 << 31  # bytes; the largest granularity (a power of two in 32 bits)


def low_water(bitmap: Mapping[str, Any] | None, size: int) -> int | None:
    """From which offset on a disk that had `size` bytes may have been cut off since; None where that is not known.

    `bitmap` is what query-named-block-nodes says of the bitmap that `marking` made.
    """
    if bitmap is None or bitmap.get("inconsistent") or bitmap.get("recording"):
        return None
    left, unit = int(bitmap["count"]), int(bitmap["granularity"])
    return size if left >= size else max(left - unit, 0)  # the last bit that is left may stand for a part


@asynccontextmanager
async def marking(qmp: Monitor, size: int) -> AsyncIterator[Mapping[str, str]]:
    """A bitmap, as block-dirty-bitmap-merge wants its source, that sets all bits of a bitmap of a disk of `size` bytes.

    Raises QmpError.
    """
    options = {"driver": "null-co", "node-name": LOW_WATER, "size": size, "read-zeroes": True}
    async with node(qmp, options):
        bitmap = {"node": LOW_WATER, "name": LOW_WATER}
        await qmp.execute("block-dirty-bitmap-add", {**bitmap, "granularity": COARSE})
        for offset in range(0, size, COARSE):
            # The only way to write without a guest, an NBD client or a job. If it says anything, then the bit is
            # missing, and so will be a part of the mark: the next backup is fuller than it had to be.
            command = f'qemu-io {LOW_WATER} "write -q -z {offset} 512"'
            said = await qmp.execute("human-monitor-command", {"command-line": command})
            if said:
                log.warning("QEMU does not note the size of a disk: %s", said.strip())
        yield bitmap


def add_all_set(
    node: str, name: str, granularity: int, persistent: bool, source: Mapping[str, str]
) -> list[Mapping[str, object]]:
    """The actions of a transaction that gives a node the bitmap `name`, all set, from what `marking` yields."""
    new = {"node": node, "name": name, "granularity": granularity, "persistent": persistent, "disabled": True}
    merge = {"node": node, "target": name, "bitmaps": [source]}
    return [
        {"type": "block-dirty-bitmap-add", "data": new},
        {"type": "block-dirty-bitmap-merge", "data": merge},
    ]
