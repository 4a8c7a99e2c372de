# SPDX-License-Identifier: LGPL-2.1-or-later
"""What each disk's backup starts from; what a person should know of that is said here, once a mount."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from qfsbackup.facts import Known
from qfsbackup.vm.bitmaps.checkpoint import Checkpoint, starting_point
from qfsbackup.vm.bitmaps.leftovers import Outcome, remove_all
from qfsbackup.vm.look.content import content_of
from qfsbackup.vm.look.graph import Device, Machine
from qfsbackup.vm.look.names import shifts
from qfsbackup.vm.look.sharing import shared
from qfsbackup.vm.monitor import Monitor

log = logging.getLogger(__name__)

SHIFTING = (
    "disk %s has no name of its own, and another one may get this name when the VM's drives change: its next backup is"
    " then a full one. Give its device an id (-device ...,id=NAME)"
)
SNAPSHOTS = (
    "disk %s holds internal snapshots (%s), and QEMU goes back to none of them while it has bitmaps. To take ours off:"
    " qfsbackup checkpoints %s --delete %s (with the VM off, the image instead of the socket)"
)


async def starting_points(
    qmp: Monitor, machine: Machine, disks: Sequence[Device], target: str | None, known: Known | None, source: str
) -> Mapping[str, Checkpoint]:
    """By the disk's name, for those that are written to; none without a target. Raises QmpError.

    `source` is what the VM is reached by. The base of a disk that others may write to is removed at once: should they
    leave, nobody would know what they have written.
    """
    found = {}
    for disk in disks:
        if disk.root.read_only:
            continue
        by_others = await shared(qmp, disk, machine.nodes)
        if by_others:
            log.warning("disk %s: %s; what they write is neither frozen nor noticed", disk.name, by_others)
        if target is None or known is None:
            continue
        if by_others:
            await _remove(qmp, disk, target)
        _warn(disk, target, source)
        content = await content_of(machine.nodes, disk.format)
        found[disk.name] = starting_point(disk, target, known.generation(disk.name), known.bases, content, by_others)
    return found


async def _remove(qmp: Monitor, disk: Device, target: str) -> None:
    report(await remove_all(qmp, lambda one: one.node == disk.format.name and one.target == target))


def _warn(disk: Device, target: str, source: str) -> None:
    if shifts(disk.name):
        log.warning(SHIFTING, disk.name)
    if disk.format.snapshots:
        log.warning(SNAPSHOTS, disk.name, ", ".join(disk.format.snapshots), source, target)


def report(outcome: Outcome) -> None:
    """Say what was removed, and what was not."""
    for line in outcome.removed:
        log.warning("of no use any more: %s", line)
    for line in outcome.left:
        log.warning("left alone: %s", line)
