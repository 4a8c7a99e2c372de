# SPDX-License-Identifier: LGPL-2.1-or-later
"""Block nodes that exist for the length of a block.

Undoing never raises: what cannot be undone is logged, and the next step is tried. It asks QEMU what there is instead of
trusting what we remember, because the VM went on living: disks are unplugged, media ejected, snapshots taken below us.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager

import trio

from qfsbackup.vm.look.graph import look_at_nodes
from qfsbackup.vm.monitor import Monitor, QmpError, QmpGoneError, QmpRefusedError

log = logging.getLogger(__name__)
UNDO_TIMEOUT = 60.0  # seconds for one step of undoing; a command's own deadline normally comes first


@contextmanager
def undoing(what: str) -> Iterator[None]:
    """One step of undoing: shielded from cancellation, with a deadline; a QmpError in it is logged, not raised."""
    problem = f"no answer within {UNDO_TIMEOUT:.0f} s"
    with trio.move_on_after(UNDO_TIMEOUT, shield=True):
        try:
            yield
        except QmpGoneError:
            return  # with it is gone what was to be undone
        except QmpError as error:
            problem = str(error)
        else:
            return
    log.error("could not %s: %s", what, problem)


@asynccontextmanager
async def node(qmp: Monitor, options: Mapping[str, object]) -> AsyncIterator[str]:
    """A node made by `blockdev-add` with these options; yields its name. Raises QmpError."""
    name = str(options["node-name"])
    try:
        await qmp.execute("blockdev-add", options)
        yield name
    finally:
        await remove_node(qmp, name)


async def remove_node(qmp: Monitor, name: str) -> None:
    """Remove a node if it is there."""
    with undoing(f"remove the block node {name}"):
        try:
            await qmp.execute("blockdev-del", {"node-name": name})
        except QmpRefusedError:
            if name in await look_at_nodes(qmp):
                raise
