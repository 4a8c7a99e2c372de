# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stop the guest's CPUs for a moment, and let them run on unless somebody else wants them stopped too.

QEMU does not count who stopped a VM: a second `stop` changes nothing and has no event, and one `cont` undoes both. But
each `stop` flushes every block node, so the mark that it was us (see ours) notes flushes:

    qfsbackup-stopped (raw) --> blkdebug, whose writes fail from the second flush on --> qfsbackup-stops, with a bitmap

A write to it that does not arrive tells of a second `stop` (measured with QEMU 7.2.22 and 10.0.2, whichever of the two
came first). QEMU's own log then has the line "write failed".
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from qfsbackup.errors import UserError
from qfsbackup.vm.look.graph import running
from qfsbackup.vm.monitor import Monitor, QmpRefusedError
from qfsbackup.vm.node import remove_node, undoing
from qfsbackup.vm.ours import STOPPED, STOPS

log = logging.getLogger(__name__)

SIZE = 512  # bytes


@dataclass(slots=True)
class Pause:
    """How long the guest's CPUs stood still, in milliseconds."""

    milliseconds: float = 0.0


@asynccontextmanager
async def stopped(qmp: Monitor, pause: Pause) -> AsyncIterator[None]:
    """Stop the guest's CPUs for the length of the block. Raises UserError where somebody let them run, QmpError."""
    try:
        await _add_mark(qmp)
    except BaseException:
        await remove_node(qmp, STOPPED)  # the answer may be lost, but nothing was stopped
        raise
    start = time.perf_counter()
    try:
        async with qmp.listen("RESUME") as resumed:
            await qmp.execute("stop")
            yield
            if await running(qmp) or resumed.any():
                raise UserError("somebody let the VM run on while its disks were to stand still", "Try again.")
    finally:
        await resume(qmp)
        pause.milliseconds = (time.perf_counter() - start) * 1000


async def resume(qmp: Monitor) -> None:
    """Let the guest that we stopped run on, if nobody else stopped it. The mark stays if that fails."""
    with undoing("let the guest run on"):
        if (await qmp.execute("query-status"))["status"] == "paused":
            if await _stopped_again(qmp):
                log.warning("the VM stays paused: somebody else has paused it too")
            else:
                await qmp.execute("cont")
        await remove_node(qmp, STOPPED)


async def _add_mark(qmp: Monitor) -> None:
    counting = {
        "driver": "blkdebug",
        "image": {"driver": "null-co", "node-name": STOPS, "size": SIZE, "read-zeroes": True},
        "set-state": [{"event": "flush_to_os", "state": 1, "new_state": 2}],
        "inject-error": [{"event": "flush_to_os", "state": 2, "iotype": "write"}],
    }
    await qmp.execute("blockdev-add", {"driver": "raw", "node-name": STOPPED, "file": counting})
    await qmp.execute("block-dirty-bitmap-add", {"node": STOPS, "name": STOPS})


async def _stopped_again(qmp: Monitor) -> bool:
    """Were there two `stop`s or more since the mark was made? Where that cannot be told: no."""
    try:
        await qmp.execute("human-monitor-command", {"command-line": f'qemu-io {STOPPED} "write -q 0 {SIZE}"'})
        nodes = await qmp.execute("query-named-block-nodes", {"flat": True})
    except QmpRefusedError:
        return False
    bitmaps = [bitmap for node in nodes if node["node-name"] == STOPS for bitmap in node.get("dirty-bitmaps", ())]
    return any(bitmap["count"] == 0 for bitmap in bitmaps)
