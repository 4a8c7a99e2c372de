# SPDX-License-Identifier: LGPL-2.1-or-later
"""Looking after a VM without mounting it: undoing what a dead mount left, listing and forgetting what was committed."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TypeVar

from qfsbackup.cli import interruptible
from qfsbackup.errors import EXIT_USAGE, UserError
from qfsbackup.facts import Base, Committed
from qfsbackup.mount.runtime import frozen_by_the_dead, sweep
from qfsbackup.options import Options
from qfsbackup.sources.qemu import vm_name
from qfsbackup.sources.uri import is_nbd_uri
from qfsbackup.state.store import DiskState, Store, find_store
from qfsbackup.vm.agent import AgentError
from qfsbackup.vm.bitmaps.checkpoint import bitmap_name, count, problem
from qfsbackup.vm.bitmaps.leftovers import FOREIGN, bitmaps_of, remove_all, remove_leftovers, remove_marked
from qfsbackup.vm.cleanup import refuse_living, undo_leftovers
from qfsbackup.vm.freeze import thaw_leftover
from qfsbackup.vm.left import left
from qfsbackup.vm.look.content import content_of
from qfsbackup.vm.look.graph import Device, Machine, look
from qfsbackup.vm.look.names import shifts
from qfsbackup.vm.monitor import Monitor, QmpError
from qfsbackup.vm.monitors.qmp_socket import connect

log = logging.getLogger(__name__)

T = TypeVar("T")


def clean_up(source: str, options: Options) -> list[str]:
    """Undo what a dead mount left behind: in the VM, and its runtime folder. What was undone, a line each.

    Of bitmaps only those go that the state store made, or that a dead mount's marks name, and that are not committed.
    Raises UserError.
    """
    done = interruptible.run(_thaw_first)
    sweep()
    return done if is_nbd_uri(source) else done + _with_vm(source, partial(_clean_up, options))


async def _thaw_first() -> list[str]:
    """Before QEMU is asked anything, for it may be stuck."""
    done = []
    for note in frozen_by_the_dead():
        try:
            agent = Path(note.read_text())
            done += [f"thawed the guest behind {agent}"] if await thaw_leftover(agent) else []
            note.unlink()
        except (AgentError, OSError) as error:
            log.warning("cannot tell whether the guest's file systems are frozen: %s", error)
    return done


def committed(source: str, options: Options) -> tuple[list[Committed], list[str]]:
    """All that targets have committed of the VM, and a line for each other bitmap of ours in it. Raises UserError."""
    return _with_vm(source, partial(_committed, options))


def forget(source: str, options: Options, target: str, *, others: bool) -> list[str]:
    """Delete a target's checkpoints from the store and from the VM. What was removed, a line each. Raises UserError.

    `others`: also the bitmaps of a target of this name that another store made.
    """
    return _with_vm(source, partial(_forget, options, target, others))


def _with_vm(source: str, work: Callable[[Path, Monitor], Awaitable[T]]) -> T:
    """Run `work` with a QMP session of the VM behind `source`. Raises UserError."""
    path = Path(source)

    async def session() -> T:
        async with connect(path, on_gone=log.debug) as qmp:
            return await work(path, qmp)

    try:
        return interruptible.run(session)
    except QmpError as error:
        raise UserError(f"the VM cannot be asked: {error}", "See whether QEMU runs and answers.") from None


def _store(options: Options, path: Path, machine: Machine) -> AbstractContextManager[Store | None]:
    return find_store(options.state, machine.uuid, vm_name(options.vm, machine, path))


async def _clean_up(options: Options, path: Path, qmp: Monitor) -> list[str]:
    done = await undo_leftovers(qmp, options.agent)
    with _store(options, path, await look(qmp)) as store:
        generations = store.generations() if store else set()

        async def committed() -> Collection[str]:
            return generations

        found = [await remove_marked(qmp, committed)]
        if store:
            found.append(await remove_leftovers(qmp, store.id(), generations))
    for outcome in found:
        done += [*outcome.removed, *(f"left alone: {line}" for line in outcome.left)]
    stays = await left(qmp)
    if stays:
        raise UserError(
            f"this cannot be removed from the VM: {', '.join(stays)}", "Something in QEMU uses it: end that."
        )
    return done


async def _committed(options: Options, path: Path, qmp: Monitor) -> tuple[list[Committed], list[str]]:
    machine = await look(qmp)
    disks = {disk.name: disk for disk in machine.disks}
    with _store(options, path, machine) as store:
        found = [
            await _describe(machine, target, name, state, disks.get(name))
            for target, states in (store.targets() if store else {}).items()
            for name, state in states.items()
        ]
        return found, _others(machine, store)


def _others(machine: Machine, store: Store | None) -> list[str]:
    known = store.generations() if store else set()
    return [
        f"{bitmap.target}  {bitmap}: {'of no use' if store and bitmap.generation.startswith(store.id()) else FOREIGN}"
        for bitmap in bitmaps_of(machine.nodes.values())
        if bitmap.generation not in known and not bitmap.companion
    ]


async def _describe(machine: Machine, target: str, name: str, state: DiskState, disk: Device | None) -> Committed:
    dirty, reason = None, "the VM has no such disk now"
    if disk and disk.nodes:
        base = Base(state.generation, state.size, state.content)
        reason = problem(disk, target, base, await content_of(machine.nodes, disk.format))
        dirty = None if reason else count(disk.format, bitmap_name(target, state.generation))
    return Committed(target, name, state.generation, state.instant, state.size, dirty, reason, shifts(name))


async def _forget(options: Options, target: str, others: bool, path: Path, qmp: Monitor) -> list[str]:
    await refuse_living(qmp)
    with _store(options, path, await look(qmp)) as store:
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
    left = [f"left alone: {line}" for line in outcome.left]
    return [f"forgot target {target}: its next backup is a full one", *outcome.removed, *left]
