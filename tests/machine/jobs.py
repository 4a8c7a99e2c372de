# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules: external snapshots, block jobs that end with another image below a disk, and others' jobs that go on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.machine.base import Base

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
        if not self.job("block-commit", device=self.root(slot)):
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
    def mirror(self, number: int, form: Literal["raw", "qcow2"]) -> None:
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

    @rule(number=NUMBERS, kind=st.sampled_from(["blockdev-backup", "blockdev-mirror"]))
    @precondition(lambda self: self.world.plugged and not self.jobs and not self.mounted)
    def foreign_job(self, number: int, kind: str) -> None:
        """Somebody else's, that does not end by itself."""
        slot = self.slot(number)
        assert slot
        target = f"foreign{self.world.number()}"
        size = self.world.block(slot)["inserted"]["image"]["virtual-size"]
        self.world.qmp("blockdev-add", driver="null-co", node_name=target, size=size)
        words: dict[str, Any] = {"job_id": "foreign", "device": self.root(slot), "target": target, "sync": "none"}
        if self.world.refused(kind, **words):
            self.world.qmp("blockdev-del", node_name=target)
        else:
            self.jobs["foreign"] = target

    @rule()
    @precondition(lambda self: self.jobs)
    def foreign_job_ends(self) -> None:
        self.world.qmp("job-cancel", id="foreign")
        self.concluded("foreign", switch=False)
        self.world.qmp("blockdev-del", node_name=self.jobs.pop("foreign"))

    def job(self, command: str, **arguments: Any) -> str:
        """Run a block job to its end; why there is none, if QEMU refuses it."""
        job = f"job{self.world.number()}"
        refused = self.world.refused(command, job_id=job, **arguments)
        if not refused:
            self.concluded(job)
        return refused

    def concluded(self, job: str, *, switch: bool = True) -> None:
        """Wait for its end; where it waits for a word to switch over, say it."""
        while True:
            status = self.world.event("JOB_STATUS_CHANGE", id=job)["data"]["status"]
            if status == "ready" and switch:
                self.world.qmp("job-complete", id=job)
            elif status == "null":
                return

    def disturb(self) -> None:
        if self.mounted:
            self.mounted.disturbed = True
