# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules: external snapshots, and block jobs that end with another image below a disk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.machine.base import Base
from tests.machine.world import Format

NUMBERS = st.integers(0, 1)


class Jobs(Base):
    """QEMU may refuse each of these, above all while there is a mount; then nothing has happened."""

    @rule(number=NUMBERS)
    @precondition(lambda self: self.world.plugged)
    def snapshot(self, number: int) -> None:
        """An external one: the disk goes on in an overlay."""
        slot = self.slot(number)
        assert slot
        top = f"overlay{self.world.number()}"
        node = {"snapshot_node_name": f"node-{top}"} if self.world.flavour == "blockdev" else {}
        path = slot.image.folder / top
        if not self.world.refused(
            "blockdev-snapshot-sync", node_name=self.root(slot), snapshot_file=str(path), format="qcow2", **node
        ):
            slot.image = replace(slot.image, top=top, format="qcow2")
            self.disturb()

    @rule(number=NUMBERS)
    @precondition(lambda self: self.world.plugged)
    def block_commit(self, number: int) -> None:
        """All overlays go down into the first image."""
        slot = self.slot(number)
        assert slot
        top = self.root(slot)
        if not self.job("block-commit", device=top):
            self.world.refused("blockdev-del", node_name=top)  # it may be gone already, or not be ours to remove
            slot.image = replace(slot.image, top="base", format=slot.image.base)
            self.disturb()

    @rule(number=NUMBERS)
    @precondition(lambda self: self.world.plugged)
    def block_stream(self, number: int) -> None:
        """All that is below comes up into the top image."""
        slot = self.slot(number)
        assert slot
        self.job("block-stream", device=self.root(slot))

    @rule(number=NUMBERS, form=st.sampled_from(["raw", "qcow2"]))
    @precondition(lambda self: self.world.plugged)
    def mirror(self, number: int, form: Format) -> None:
        """The disk moves to another image."""
        slot = self.slot(number)
        assert slot
        image = self.world.new_folder(form)
        node = {"node_name": f"mirror{self.world.number()}"} if self.world.flavour == "blockdev" else {}
        if not self.job(
            "drive-mirror", device=self.root(slot), target=str(image.path), format=form, sync="full", **node
        ):
            slot.image = image
            self.disturb()

    def job(self, command: str, **arguments: Any) -> str:
        """Run a block job to its end; why there is none, if QEMU refuses it."""
        job = f"job{self.world.number()}"
        refused = self.world.refused(command, job_id=job, **arguments)
        if not refused:
            self.concluded(job)
        return refused

    def concluded(self, job: str) -> None:
        """Wait for its end; where it waits for a word to switch over, say it."""
        while True:
            status = self.world.event("JOB_STATUS_CHANGE", id=job)["data"]["status"]
            if status == "ready":
                self.world.qmp("job-complete", id=job)
            elif status == "null":
                return

    def disturb(self) -> None:
        if self.mounted:
            self.mounted.disturbed = True
