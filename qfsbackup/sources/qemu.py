# SPDX-License-Identifier: LGPL-2.1-or-later
"""The source `qmp:/PATH`: a snapshot of a running QEMU VM, taken through a QMP socket that is ours alone."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import trio

from qfsbackup.errors import UserError
from qfsbackup.facts import CLUSTER, CheckpointRequest, Export, Known, Snapshot
from qfsbackup.status import DiskStatus, Status
from qfsbackup.vm.bitmaps.leftovers import bitmaps_of, remove_bitmap, remove_leftovers, remove_marked
from qfsbackup.vm.bitmaps.starting_points import report, starting_points
from qfsbackup.vm.cleanup import undo_leftovers
from qfsbackup.vm.fleecing import look_at
from qfsbackup.vm.freeze import Freeze
from qfsbackup.vm.left import left
from qfsbackup.vm.look.config import config_files
from qfsbackup.vm.look.graph import Machine, look, look_at_nodes
from qfsbackup.vm.look.selection import choose, left_out, refuse_disks, refuse_machine
from qfsbackup.vm.monitor import Monitor, QmpError
from qfsbackup.vm.monitors.qmp_socket import connect
from qfsbackup.vm.node import undoing
from qfsbackup.vm.ours import MAP
from qfsbackup.vm.presence import listens
from qfsbackup.vm.quirks import text
from qfsbackup.vm.recipes import RECIPES
from qfsbackup.vm.snapshot import Served, Taken, take

log = logging.getLogger(__name__)

NBD_SOCKET = "nbd.sock"
FROZEN_NOTE = "frozen"  # see runtime
AGAIN_TIMEOUT = 30.0  # seconds; the supervisor does not wait much longer for us


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuSource:
    """A running VM. `runtime` is a 0700 folder of ours with a short path, for the NBD socket."""

    socket: Path  # the QMP socket
    runtime: Path
    fleece: Path  # where fleecing files go
    status: Status
    freeze: Literal["auto", "require", "off"] = "auto"
    agent: Path | None = None  # the guest agent's socket
    disks: Collection[str] = ()  # names; none: every writable disk with a medium
    exclude: Collection[str] = ()
    vm: str | None = None  # what to call the VM, instead of what QEMU calls it
    checkpoint: CheckpointRequest | None = None  # the target whose next generation this is
    committed: Callable[[str], Awaitable[Collection[str]]] | None = None  # VM's name -> generations that a store names

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Snapshot]:
        """Take it; see contracts.Source. When QEMU goes away meanwhile, `status.vm_gone` says so at once.

        `status.unrestored` says at the end what could not be undone.
        """
        qmp: Monitor | None = None
        uncommitted: set[str] = set()  # generations that were begun
        try:
            async with AsyncExitStack() as stack:
                try:
                    qmp = await stack.enter_async_context(connect(self.socket, on_gone=self._gone))
                    snapshot = await self._snapshot(qmp, stack, uncommitted)
                except QmpError as error:
                    raise UserError(
                        f"QEMU does not give a snapshot: {error}", "The VM is as it was; look at its log and its state."
                    ) from error
                _log(snapshot)
                yield snapshot
        finally:
            if qmp is not None and qmp.is_left:
                self.status.unrestored = qmp.gone
                log.error("the VM is left with our filters for now: %s", qmp.gone)
            elif self.status.vm_gone or (qmp is not None and qmp.hung):
                await self._clean_up_again(uncommitted)

    @asynccontextmanager
    async def _seeing_what_is_left(self, qmp: Monitor, uncommitted: Collection[str]) -> AsyncIterator[None]:
        """After all that the block makes is undone, ask QEMU whether that is so, also of these generations' bitmaps."""
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                try:
                    self.status.unrestored = ", ".join(await left(qmp)) or None
                    await self._tell_what_is_left(qmp, uncommitted)
                except QmpError as error:
                    log.debug("QEMU cannot be asked what is left: %s", error)

    async def _tell_what_is_left(self, qmp: Monitor, uncommitted: Collection[str]) -> None:
        """What QEMU will never remove, from an image that became read-only, is named; trying again would not help."""
        if self.status.unrestored:
            log.error("left in the VM: %s", self.status.unrestored)
            return
        nodes = (await look_at_nodes(qmp)).values()
        stays = [str(one) for one in bitmaps_of(nodes) if one.generation in uncommitted and not one.companion]
        if stays:
            log.warning("QEMU is as it was, but for what it does not remove: %s", ", ".join(stays))
        else:
            log.info("QEMU is as it was")

    async def _clean_up_again(self, uncommitted: Collection[str]) -> None:
        """Where there was no answer, nothing could be undone; QEMU may be alive all the same."""
        self.status.unrestored = "QEMU does not answer" if listens(self.socket) else None
        with trio.move_on_after(AGAIN_TIMEOUT, shield=True):
            try:
                async with connect(self.socket, on_gone=log.debug) as qmp:
                    for undone in await undo_leftovers(qmp, self.agent):
                        log.warning("after the connection to QEMU was lost: %s", undone)
                    await self._remove_marked(qmp, await look(qmp))
                    self.status.unrestored = ", ".join(await left(qmp)) or None
                    await self._tell_what_is_left(qmp, uncommitted)
            except (UserError, QmpError) as error:
                log.debug("nothing can be undone: %s", error)

    async def _snapshot(self, qmp: Monitor, stack: AsyncExitStack, uncommitted: set[str]) -> Snapshot:
        for undone in await undo_leftovers(qmp, self.agent):
            log.warning("left by an earlier snapshot: %s", undone)
        machine = await look(qmp)
        refuse_machine(machine)
        await self._remove_marked(qmp, machine)
        known = await self._known(qmp, machine)
        machine = await look(qmp)
        chosen = choose(machine, self.disks, self.exclude)
        refuse_disks(machine, chosen)
        config = await config_files(qmp)
        target = self.checkpoint.target if self.checkpoint else None
        checkpoints = await starting_points(qmp, machine, chosen, target, known, str(self.socket))
        uncommitted.update(point.generation for point in checkpoints.values())
        taking = take(
            qmp,
            machine,
            chosen,
            recipe=RECIPES["filters"],
            checkpoints=checkpoints,
            in_image=self.checkpoint is None or self.checkpoint.in_image,
            fleece=self.fleece,
            socket_path=self.runtime / NBD_SOCKET,
            freeze=Freeze(self.freeze, self.agent, self.runtime / FROZEN_NOTE),
        )
        await stack.enter_async_context(self._seeing_what_is_left(qmp, uncommitted))
        taken = await stack.enter_async_context(taking)
        self._count(taken)
        snapshot = self._facts(machine, taken, config)
        return (
            replace(snapshot, keep=partial(self._keep, qmp, machine, taken, known, uncommitted)) if known else snapshot
        )

    async def _remove_marked(self, qmp: Monitor, machine: Machine) -> None:
        if self.committed:
            report(await remove_marked(qmp, partial(self.committed, vm_name(self.vm, machine, self.socket))))

    async def _known(self, qmp: Monitor, machine: Machine) -> Known | None:
        """What is known of the target, if there is one; bitmaps of it that are no base are removed."""
        if self.checkpoint is None:
            return None
        known = await self.checkpoint.known(machine.uuid, vm_name(self.vm, machine, self.socket))
        report(await remove_leftovers(qmp, known.store, known.committed))
        return known

    async def _keep(self, qmp: Monitor, machine: Machine, taken: Taken, known: Known, uncommitted: set[str]) -> None:
        """Bases that were replaced go, also from where they are now, should disks have changed their names."""
        uncommitted.clear()
        await taken.keep()
        points = {served.disk.name: served.checkpoint for served in taken.served if served.checkpoint}
        replaced = {base.generation for name, base in known.bases.items() if name in points}
        gone = {(served.disk.format.name, served.checkpoint.base) for served in taken.served if served.checkpoint}
        for bitmap in bitmaps_of(machine.nodes.values()):
            if bitmap.generation in replaced and (bitmap.node, bitmap.generation) not in gone:
                with undoing(f"remove {bitmap}, which was replaced"):
                    await remove_bitmap(qmp, bitmap)

    def _gone(self, reason: str) -> None:
        self.status.vm_gone = reason
        log.error("the VM is gone: %s", reason)

    def _count(self, taken: Taken) -> None:
        files = {served.disk.name: served.fleecing for served in taken.served if served.fleecing}
        if files:
            self.status.look_at_fleecing = partial(look_at, files, self.fleece)
        for served in taken.served:
            self.status.disks[served.disk.name] = DiskStatus(served.disk.root.size)

    def _facts(self, machine: Machine, taken: Taken, config: Mapping[str, bytes]) -> Snapshot:
        names = {served.disk.name for served in taken.served}
        left = {disk.name: left_out(disk) or "not chosen" for disk in machine.disks if disk.name not in names}
        return Snapshot(
            vm=vm_name(self.vm, machine, self.socket),
            uuid=machine.uuid,
            instant=taken.instant,
            exports=tuple(self._export(served) for served in taken.served),
            frozen=taken.frozen,
            pause_ms=taken.pause_ms,
            details={"qemu": text(machine.version), "disks_left_out": left},
            config=config,
        )

    def _export(self, served: Served) -> Export:
        disk, point = served.disk, served.checkpoint
        return Export(
            disk=disk.name,
            uri=f"nbd+unix:///{served.export}?socket={quote(str(self.runtime / NBD_SOCKET))}",
            size=disk.root.size,
            dirty_context=f"qemu:dirty-bitmap:{MAP}" if point and point.base else None,
            can_trim=served.fleecing is not None,
            request_unit=served.request_unit,
            copied=served.fleecing.copied if served.fleecing and served.request_unit else None,
            allocation=served.allocation,
            low_water=point.low_water if point and point.base else None,
            bitmap=point.status if point else "none",
            bitmap_reason=point.reason if point else "",
            generation=point.generation if point else None,
            base=point.base if point else None,
            transient=served.transient or "",
            content=point.content if point else "",
            details={
                "interface": disk.kind,
                "format": disk.format.driver,
                "file": disk.format.filename,
                "cluster": CLUSTER,
            },
        )


def _log(snapshot: Snapshot) -> None:
    log.info(
        "took a snapshot of %s: %s; file systems %s, guest paused %.1f ms",
        snapshot.vm,
        ", ".join(f"{export.disk} ({export.size} bytes)" for export in snapshot.exports),
        "frozen" if snapshot.frozen else "not frozen",
        snapshot.pause_ms,
    )


def vm_name(given: str | None, machine: Machine, socket: Path) -> str:
    """What a VM is called: as the person says, else as QEMU says, else as its socket is."""
    return given or machine.name or socket.stem
