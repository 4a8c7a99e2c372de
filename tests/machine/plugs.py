# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules: disks are unplugged and plugged again, under the same name or another one."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.machine.base import Base
from tests.machine.world import Slot

IDS = ("vda", "vdb", "vdc")


class Plugs(Base):
    """SCSI disks: others need a guest that lets go of them. What stays of an unplugged disk is its nodes."""

    @rule(number=st.integers(0, 1))
    @precondition(lambda self: self.world.flavour == "blockdev" and self.world.plugged)
    def unplug(self, number: int) -> None:
        slot = self.slot(number)
        assert slot
        self._unplug(slot)
        if self.mounted:
            self.mounted.disturbed = True

    def _unplug(self, slot: Slot) -> None:
        slot.node = self.root(slot)
        self.world.qmp("device_del", id=slot.id)
        self.world.event("DEVICE_DELETED", device=slot.id)
        slot.plugged = False

    @rule(number=st.integers(0, 1), name=st.sampled_from(IDS))
    @precondition(lambda self: not self.mounted and not self.dead and not self.jobs)
    def plug(self, number: int, name: str) -> None:
        missing = [slot for slot in self.world.slots if not slot.plugged]
        if not missing or name in [slot.id for slot in self.world.plugged]:
            return
        self._plug(missing[number % len(missing)], name)

    def _plug(self, slot: Slot, name: str) -> None:
        if slot.node not in [node["node-name"] for node in self.world.qmp("query-named-block-nodes", flat=True)]:
            slot.node = f"node{self.world.number()}"  # an overlay's node goes with its device
            file = {"driver": "file", "filename": str(slot.image.path)}
            self.world.qmp("blockdev-add", driver=slot.image.format, node_name=slot.node, file=file)
        slot.id, slot.plugged = name, True
        self.world.qmp("device_add", driver="scsi-hd", bus="scsi0.0", id=name, drive=slot.node)

    @rule()
    @precondition(lambda self: not self.mounted and not self.dead and len(self.world.plugged) == 2)
    @precondition(lambda self: self.world.flavour == "blockdev" and not self.jobs)
    def plug_crosswise(self) -> None:
        """Two disks, each under the other's name, and QEMU runs on."""
        one, other = self.world.slots
        names = other.id, one.id
        for slot in (one, other):
            self._unplug(slot)
        for slot, name in zip((one, other), names, strict=True):
            self._plug(slot, name)
