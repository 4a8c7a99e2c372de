# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can be done with a running VM without a snapshot: undo what a dead mount left, list and forget checkpoints."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Collection
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from datetime import UTC, datetime

from qfsbackup.errors import EXIT_USAGE, UserError
from qfsbackup.facts import Base
from qfsbackup.options import Options
from qfsbackup.sizes import human
from qfsbackup.sources.vm import VmSource
from qfsbackup.state.store import DiskState, Store, find_store
from qfsbackup.vm.bitmaps.checkpoint import bitmap_name, count, problem
from qfsbackup.vm.bitmaps.leftovers import FOREIGN, bitmaps_of, remove_all, remove_leftovers, remove_marked
from qfsbackup.vm.cleanup import refuse_living, undo_leftovers
from qfsbackup.vm.left import left
from qfsbackup.vm.look.content import content_of
from qfsbackup.vm.look.graph import Machine, look
from qfsbackup.vm.look.names import shifts
from qfsbackup.vm.monitor import Monitor, QmpError

log = logging.getLogger(__name__)

SHIFTS = "; the name is the drive's place, and may shift to another disk"


@asynccontextmanager
async def _session(source: VmSource) -> AsyncIterator[Monitor]:
    try:
        async with source.connect(log.debug) as qmp:
            yield qmp
    except QmpError as error:
        raise UserError(f"the VM cannot be asked: {error}", "See whether QEMU runs and answers.") from None


def _store(source: VmSource, options: Options, machine: Machine) -> AbstractContextManager[Store | None]:
    return find_store(options.state, machine.uuid, source.vm(options, machine.name))


async def clean_up(source: VmSource, options: Options) -> list[str]:
    """See contracts.Source."""
    async with _session(source) as qmp:
        done = await undo_leftovers(qmp, source.agent(options))
        with _store(source, options, await look(qmp)) as store:
            stored = store.generations() if store else set()

            async def generations() -> Collection[str]:
                return stored

            found = [await remove_marked(qmp, generations)]
            if store:
                found.append(await remove_leftovers(qmp, store.id(), stored))
        for outcome in found:
            done += [*outcome.removed, *(f"left alone: {line}" for line in outcome.left)]
        stays = await left(qmp)
    if stays:
        raise UserError(
            f"this cannot be removed from the VM: {', '.join(stays)}", "Something in QEMU uses it: end that."
        )
    return done


async def checkpoints(source: VmSource, options: Options) -> list[str]:
    """See contracts.Source."""
    async with _session(source) as qmp:
        machine = await look(qmp)
        with _store(source, options, machine) as store:
            lines = [
                await _line(machine, target, name, state)
                for target, states in (store.targets() if store else {}).items()
                for name, state in states.items()
            ]
            return lines + _others(machine, store) or ["no target has committed a backup of this VM"]


def _others(machine: Machine, store: Store | None) -> list[str]:
    """A line for each bitmap of ours that the store does not name."""
    known = store.generations() if store else set()
    return [
        f"{bitmap.target}  {bitmap}: {'of no use' if store and bitmap.generation.startswith(store.id()) else FOREIGN}"
        for bitmap in bitmaps_of(machine.nodes.values())
        if bitmap.generation not in known and not bitmap.companion
    ]


async def _line(machine: Machine, target: str, name: str, state: DiskState) -> str:
    """What a target holds of one disk, and what a backup now would find."""
    dirty, reason = None, "the VM has no such disk now"
    for disk in machine.disks:
        if disk.name == name and disk.nodes:
            base = Base(state.generation, state.size, state.content)
            reason = problem(disk, target, base, await content_of(machine.nodes, disk.format))
            dirty = None if reason else count(disk.format, bitmap_name(target, state.generation))
    when = datetime.fromtimestamp(state.instant / 10**9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    now = f"next backup is full: {reason}" if dirty is None else f"{human(dirty)} dirty now"
    line = f"{target}  {name}  {state.generation}  {when}  {human(state.size)}, {now}"
    return line + (SHIFTS if shifts(name) else "")


async def forget(source: VmSource, options: Options, target: str, *, others: bool) -> list[str]:
    """See contracts.Source."""
    async with _session(source) as qmp:
        await refuse_living(qmp)
        with _store(source, options, await look(qmp)) as store:
            known = store.targets() if store else {}
            if target not in known and not others:
                raise UserError(
                    f"no target {target} has committed a backup of this VM",
                    f"Targets: {', '.join(known) or 'none'}. Bitmaps that another state folder made: --others",
                    EXIT_USAGE,
                )
            with store.lock(target) if store else nullcontext():
                if store:
                    store.delete(target)
                own = "" if others or not store else store.id()
                outcome = await remove_all(qmp, lambda one: one.target == target and one.generation.startswith(own))
    kept = [f"left alone: {line}" for line in outcome.left]
    return [f"forgot target {target}: its next backup is a full one", *outcome.removed, *kept]
