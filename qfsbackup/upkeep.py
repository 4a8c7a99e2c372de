# SPDX-License-Identifier: LGPL-2.1-or-later
"""Looking after a VM without mounting it: undoing what a dead mount left, listing and forgetting what was committed."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from qfsbackup import interruptible
from qfsbackup.errors import EXIT_USAGE, UserError
from qfsbackup.model import Committed
from qfsbackup.options import Options
from qfsbackup.runtime import sweep
from qfsbackup.sources.qemu import qmp_path, vm_name
from qfsbackup.sources.uri import is_nbd_uri
from qfsbackup.state.store import DiskState, Store, open_store
from qfsbackup.vm.bitmaps import bitmap_name, count, remove_leftovers, unusable
from qfsbackup.vm.cleanup import cleanup
from qfsbackup.vm.graph import Disk, Machine, look
from qfsbackup.vm.qmp import Qmp, QmpError, connect

log = logging.getLogger(__name__)

T = TypeVar("T")


def clean_up(source: str, options: Options) -> list[str]:
    """Undo what a dead mount left behind: in the VM, and its runtime folder. What was undone, a line each.

    Of bitmaps only those go that belong to a target the state store knows (or `target=`), but to no committed
    generation. Raises UserError.
    """
    sweep()
    return [] if is_nbd_uri(source) else _with_vm(source, partial(_clean_up, options))


def committed(source: str, options: Options) -> list[Committed]:
    """All that targets have committed of the VM. Raises UserError."""
    return _with_vm(source, partial(_committed, options))


def forget(source: str, options: Options, target: str) -> list[str]:
    """Delete a target's checkpoints from the store and from the VM. What was removed, a line each. Raises UserError."""
    return _with_vm(source, partial(_forget, options, target))


def _with_vm(source: str, work: Callable[[Path, Qmp], Awaitable[T]]) -> T:
    """Run `work` with a QMP session of the VM behind `source`. Raises UserError."""
    path = qmp_path(source)

    async def session() -> T:
        async with connect(path, on_gone=log.debug) as qmp:
            return await work(path, qmp)

    try:
        return interruptible.run(session)
    except QmpError as error:
        raise UserError(f"the VM cannot be asked: {error}", "See whether QEMU runs and answers.") from None


@contextmanager
def _store(options: Options, path: Path, machine: Machine) -> Iterator[Store]:
    with open_store(options.state, machine.uuid, vm_name(options.vm, machine, path)) as store:
        yield store


async def _clean_up(options: Options, path: Path, qmp: Qmp) -> list[str]:
    done = await cleanup(qmp, options.agent)
    with _store(options, path, await look(qmp)) as store:
        known: Mapping[str, Mapping[str, DiskState]] = store.targets()
        if options.target:
            known = {options.target: {}, **known}
        for target, disks in known.items():
            done += await remove_leftovers(qmp, target, {state.generation for state in disks.values()})
    return done


async def _committed(options: Options, path: Path, qmp: Qmp) -> list[Committed]:
    machine = await look(qmp)
    disks = {disk.name: disk for disk in machine.disks}
    with _store(options, path, machine) as store:
        return [
            _describe(target, name, state, disks.get(name))
            for target, states in store.targets().items()
            for name, state in states.items()
        ]


def _describe(target: str, name: str, state: DiskState, disk: Disk | None) -> Committed:
    dirty, reason = None, "the VM has no such disk now"
    if disk and disk.chain:
        bitmap = bitmap_name(target, state.generation)
        reason = unusable(disk.format, bitmap)
        dirty = None if reason else count(disk.format, bitmap)
    return Committed(target, name, state.generation, state.instant, state.size, dirty, reason)


async def _forget(options: Options, target: str, path: Path, qmp: Qmp) -> list[str]:
    with _store(options, path, await look(qmp)) as store:
        if target not in store.targets():
            known = ", ".join(store.targets()) or "none"
            raise UserError(f"no target {target} has committed a backup of this VM", f"Targets: {known}.", EXIT_USAGE)
        with store.lock(target):
            store.delete(target)
            removed = await remove_leftovers(qmp, target, ())
    return [f"forgot target {target}: its next backup is a full one", *removed]
