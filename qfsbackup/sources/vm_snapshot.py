# SPDX-License-Identifier: LGPL-2.1-or-later
"""A snapshot of a running VM, taken over QMP and read over NBD; and what becomes of it when QEMU goes away."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from urllib.parse import quote

import trio

from qfsbackup.contracts import Mounting, Snapshot, SnapshotDisk
from qfsbackup.errors import UserError
from qfsbackup.facts import CLUSTER, Known
from qfsbackup.nbd.export import Export
from qfsbackup.nbd.opening import OpenDisk, connected_disks
from qfsbackup.sources.vm import VmSource
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
from qfsbackup.vm.node import undoing
from qfsbackup.vm.ours import MAP
from qfsbackup.vm.quirks import text
from qfsbackup.vm.recipes import RECIPES
from qfsbackup.vm.snapshot import Served, Taken, take

log = logging.getLogger(__name__)

NBD_SOCKET = "nbd.sock"
AGAIN_TIMEOUT = 30.0  # seconds; the supervisor does not wait much longer for us


@dataclass(frozen=True, slots=True)
class VmSnapshot:
    """One snapshot of a VM, from its beginning to its end."""

    source: VmSource
    mounting: Mounting
    uncommitted: set[str] = field(default_factory=set)  # generations that were begun

    @asynccontextmanager
    async def taken(self) -> AsyncIterator[Snapshot]:
        """Take it; see contracts.Source."""
        qmp: Monitor | None = None
        try:
            async with AsyncExitStack() as stack:
                try:
                    qmp = await stack.enter_async_context(self.source.connect(self._gone))
                    snapshot = await self._snapshot(qmp, stack)
                except QmpError as error:
                    raise UserError(
                        f"QEMU does not give a snapshot: {error}", "The VM is as it was; look at its log and its state."
                    ) from error
                log.info(
                    "took a snapshot of %s: %s; file systems %s, guest paused %.1f ms",
                    snapshot.vm,
                    ", ".join(f"{disk.name} ({disk.size} bytes)" for disk in snapshot.disks),
                    "frozen" if snapshot.frozen else "not frozen",
                    snapshot.pause_ms,
                )
                yield snapshot
        finally:
            if qmp is not None and qmp.is_left:
                self.mounting.status.unrestored = qmp.gone
                log.error("the VM is left with our filters for now: %s", qmp.gone)
            elif self.mounting.status.vm_gone or (qmp is not None and qmp.hung):
                await self._clean_up_again()

    @asynccontextmanager
    async def _seeing_what_is_left(self, qmp: Monitor) -> AsyncIterator[None]:
        """After all that the block makes is undone, ask QEMU whether that is so, also of what was begun."""
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                try:
                    await self._tell_what_is_left(qmp)
                except QmpError as error:
                    log.debug("QEMU cannot be asked what is left: %s", error)

    async def _tell_what_is_left(self, qmp: Monitor) -> None:
        """What QEMU will never remove, from an image that became read-only, is named; trying again would not help."""
        self.mounting.status.unrestored = ", ".join(await left(qmp)) or None
        if self.mounting.status.unrestored:
            log.error("left in the VM: %s", self.mounting.status.unrestored)
            return
        nodes = (await look_at_nodes(qmp)).values()
        stays = [str(one) for one in bitmaps_of(nodes) if one.generation in self.uncommitted and not one.companion]
        if stays:
            log.warning("QEMU is as it was, but for what it does not remove: %s", ", ".join(stays))
        else:
            log.info("QEMU is as it was")

    async def _clean_up_again(self) -> None:
        """Where there was no answer, nothing could be undone; QEMU may be alive all the same."""
        self.mounting.status.unrestored = "QEMU does not answer" if self.source.is_there() else None
        with trio.move_on_after(AGAIN_TIMEOUT, shield=True):
            try:
                async with self.source.connect(log.debug) as qmp:
                    for undone in await undo_leftovers(qmp, self.source.agent(self.mounting.options)):
                        log.warning("after the connection to QEMU was lost: %s", undone)
                    await self._remove_marked(qmp, await look(qmp))
                    await self._tell_what_is_left(qmp)
            except (UserError, QmpError) as error:
                log.debug("nothing can be undone: %s", error)

    async def _snapshot(self, qmp: Monitor, stack: AsyncExitStack) -> Snapshot:
        options, checkpoint = self.mounting.options, self.mounting.checkpoint
        agent, nbd_socket = self.source.agent(options), self.mounting.runtime / NBD_SOCKET
        for undone in await undo_leftovers(qmp, agent):
            log.warning("left by an earlier snapshot: %s", undone)
        machine = await look(qmp)
        refuse_machine(machine)
        recipe = RECIPES[options.recipe]
        recipe.check(machine.version)
        await self._remove_marked(qmp, machine)
        known = await self._known(qmp, machine)
        machine = await look(qmp)
        chosen = choose(machine, options.disks, options.exclude)
        refuse_disks(machine, chosen)
        config = await config_files(qmp)
        target = checkpoint.target if checkpoint else None
        points = await starting_points(qmp, machine, chosen, target, known, self.source.name)
        self.uncommitted.update(point.generation for point in points.values())
        taking = take(
            qmp,
            machine,
            chosen,
            recipe=recipe,
            checkpoints=points,
            in_image=checkpoint is None or checkpoint.in_image,
            fleece=options.fleece,
            socket_path=nbd_socket,
            freeze=Freeze(options.freeze, agent, self.mounting.frozen_note),
            lost=self.mounting.status.health.mark_broken,
        )
        await stack.enter_async_context(self._seeing_what_is_left(qmp))
        taken = await stack.enter_async_context(taking)
        files = {served.disk.name: served.fleecing for served in taken.served if served.fleecing}
        if files:
            self.mounting.status.look_at_fleecing = partial(look_at, files, options.fleece)
        exports = [_export(served, nbd_socket) for served in taken.served]
        disks = await stack.enter_async_context(connected_disks(exports, self.mounting, own=True))
        snapshot = self._facts(machine, taken, disks, config)
        return replace(snapshot, keep=partial(self._keep, qmp, machine, taken, known)) if known else snapshot

    async def _remove_marked(self, qmp: Monitor, machine: Machine) -> None:
        if self.mounting.generations:
            report(await remove_marked(qmp, partial(self.mounting.generations, self._vm_name(machine))))

    async def _known(self, qmp: Monitor, machine: Machine) -> Known | None:
        """What is known of the target, if there is one; bitmaps of it that are no base are removed."""
        if self.mounting.checkpoint is None:
            return None
        known = await self.mounting.checkpoint.known(machine.uuid, self._vm_name(machine))
        report(await remove_leftovers(qmp, known.store, known.generations))
        return known

    async def _keep(self, qmp: Monitor, machine: Machine, taken: Taken, known: Known) -> None:
        """Bases that were replaced go, also from where they are now, should disks have changed their names."""
        self.uncommitted.clear()
        await taken.keep()
        points = {served.disk.name: served.checkpoint for served in taken.served if served.checkpoint}
        replaced = {base.generation for name, base in known.bases.items() if name in points}
        gone = {(served.disk.format.name, served.checkpoint.base) for served in taken.served if served.checkpoint}
        for bitmap in bitmaps_of(machine.nodes.values()):
            if bitmap.generation in replaced and (bitmap.node, bitmap.generation) not in gone:
                with undoing(f"remove {bitmap}, which was replaced"):
                    await remove_bitmap(qmp, bitmap)

    def _gone(self, reason: str) -> None:
        self.mounting.status.vm_gone = reason
        log.error("the VM is gone: %s", reason)

    def _vm_name(self, machine: Machine) -> str:
        return self.source.vm(self.mounting.options, machine.name)

    def _facts(
        self, machine: Machine, taken: Taken, disks: Sequence[OpenDisk], config: Mapping[str, bytes]
    ) -> Snapshot:
        names = {served.disk.name for served in taken.served}
        left = {disk.name: left_out(disk) or "not chosen" for disk in machine.disks if disk.name not in names}
        return Snapshot(
            vm=self._vm_name(machine),
            uuid=machine.uuid,
            instant=taken.instant,
            disks=tuple(_disk(served, disk) for served, disk in zip(taken.served, disks, strict=True)),
            own=True,
            frozen=taken.frozen,
            pause_ms=taken.pause_ms,
            details={"qemu": text(machine.version), "recipe": self.mounting.options.recipe, "disks_left_out": left},
            config=config,
        )


def _export(served: Served, socket: Path) -> Export:
    point, fleecing = served.checkpoint, served.fleecing
    incremental = point is not None and point.base is not None
    return Export(
        disk=served.disk.name,
        uri=f"nbd+unix:///{served.export}?socket={quote(str(socket))}",
        size=served.disk.root.size,
        dirty_context=f"qemu:dirty-bitmap:{MAP}" if incremental else None,
        request_unit=served.request_unit,
        copied=fleecing.copied if fleecing and served.request_unit else None,
        allocation=served.allocation,
        low_water=point.low_water if point and incremental else None,
    )


def _disk(served: Served, opener: OpenDisk) -> SnapshotDisk:
    disk, point = served.disk, served.checkpoint
    file = {"interface": disk.kind, "format": disk.format.driver, "file": disk.format.filename, "cluster": CLUSTER}
    if point is None:
        return SnapshotDisk(disk.name, disk.root.size, opener, details=file)
    return SnapshotDisk(
        disk.name,
        disk.root.size,
        opener,
        bitmap=point.status,
        bitmap_reason=point.reason,
        generation=point.generation,
        base=point.base,
        transient=served.transient or "",
        content=point.content,
        details=file,
    )
