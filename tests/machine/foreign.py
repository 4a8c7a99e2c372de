# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules: somebody else's block jobs, which do not end by themselves, begin and end at any time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from qfsbackup.errors import EXIT_MOUNT, EXIT_SYSTEM
from qfsbackup.vm.ours import JOB as JOBS
from tests.harness.monitor import Monitor, QmpError
from tests.machine.backups import WHOLE, Backups
from tests.machine.base import TARGETS, end_job

Kind = Literal["blockdev-backup", "blockdev-mirror"]
Where = Literal["device", "disk"]  # on the node of the guest's device, which may be our filter; below that
KINDS = st.sampled_from(["blockdev-backup", "blockdev-mirror"])
WHERES = st.sampled_from(["device", "disk"])
NUMBERS = st.integers(0, 1)
JOB = "foreign"


@dataclass
class Intruder:
    """A hook for the QMP proxy: a job begins at one command of the product and ends at a later one."""

    monitor: Monitor
    kind: Kind
    arguments: dict[str, Any]
    begin: int  # commands still to pass
    end: int
    running: bool = False
    began: bool = False

    async def __call__(self, _name: str, _arguments: dict[str, Any]) -> None:
        self.begin -= 1
        if self.begin == 0:
            with contextlib.suppress(QmpError):
                await self.monitor.execute(self.kind, self.arguments)
                self.began = self.running = True
        if self.running and self.begin <= -self.end:
            await self.stop()

    async def stop(self) -> None:
        """At the latest when the product is done."""
        if self.running:
            self.running = False
            await end_job(self.monitor, JOB, self.arguments["target"])


class ForeignJobs(Backups):
    """A mount is refused, is ready, or is called off; what we leave is gone at the latest when the job is."""

    @rule(number=NUMBERS, kind=KINDS, where=WHERES)
    @precondition(lambda self: self.world.plugged and not self.jobs and not (self.mounted and self.mounted.gone))
    def foreign_job(self, number: int, kind: Kind, where: Where) -> None:
        arguments = self.foreign_arguments(number, where)
        if self.world.refused(kind, **arguments):
            self.world.qmp("blockdev-del", node_name=arguments["target"])
        else:
            self.jobs[JOB] = arguments["target"]

    def foreign_arguments(self, number: int, where: Where) -> dict[str, Any]:
        """A target is made for the job."""
        slot = self.slot(number)
        assert slot
        target = f"foreign{self.world.number()}"
        inserted = self.world.block(slot)["inserted"]
        self.world.qmp("blockdev-add", driver="null-co", node_name=target, size=inserted["image"]["virtual-size"])
        device = inserted["node-name"] if where == "device" else self.root(slot)
        return {"job_id": JOB, "device": device, "target": target, "sync": "none"}

    @rule()
    @precondition(lambda self: self.jobs)
    def end_foreign_job(self) -> None:
        self.foreign_job_ends()

    @rule(number=NUMBERS, kind=KINDS, begin=st.integers(1, 60), end=st.integers(1, 30), to=st.sampled_from(TARGETS))
    @precondition(lambda self: not self.mounted and not self.dead and not self.jobs and self.world.plugged)
    def foreign_job_while_mounting(self, number: int, kind: Kind, begin: int, end: int, to: str) -> None:
        bitmaps = self.bitmaps()
        with self.others_see_nothing():
            with self.intruder(number, kind, "disk", begin, end) as intruder:
                command = self.try_mount(to, WHOLE)
            if not self.mounted:
                refused = command.wait()
                assert intruder.began
                assert refused.code in (EXIT_MOUNT, EXIT_SYSTEM), refused
                self.nothing_is_left(refused.stderr)
                assert self.bitmaps() <= bitmaps, refused.stderr
        if self.mounted:
            self.shows_the_instant()

    @rule(number=NUMBERS, kind=KINDS, where=WHERES, begin=st.integers(1, 20), end=st.integers(1, 30))
    @precondition(lambda self: self.mounted and not self.mounted.gone and not self.jobs and self.world.plugged)
    def foreign_job_while_leaving(self, number: int, kind: Kind, where: Where, begin: int, end: int) -> None:
        assert self.mounted
        mounted, self.mounted = self.mounted, None
        with self.others_see_nothing():
            with self.intruder(number, kind, where, begin, end):
                result = self.commands.run("umount", self.mountpoint)
            assert result.code == 0 or result.stderr.startswith("unmounted, but "), result
            ended = mounted.command.wait()
            assert ended.code in (0, EXIT_SYSTEM), ended
            self.nothing_is_left(ended.stderr)
        self.bitmaps_are_right(mounted)

    @rule(number=NUMBERS)
    @precondition(lambda self: self.mounted and self.mounted.facts["recipe"] == "jobs" and not self.mounted.gone)
    @precondition(lambda self: not self.jobs)
    def end_our_job(self, number: int) -> None:
        """It breaks the snapshot."""
        assert self.mounted
        mounted, self.mounted = self.mounted, None
        with self.others_see_nothing():
            ours = [job["id"] for job in self.world.qmp("query-jobs") if job["id"].startswith(JOBS)]
            self.world.qmp("job-cancel", id=ours[number % len(ours)])
            result = self.commands.run("umount", self.mountpoint)
            assert result.code == EXIT_SYSTEM, result
            assert "somebody has ended the block job" in result.stderr, result
        self.ended(mounted, EXIT_SYSTEM)

    @contextlib.contextmanager
    def intruder(self, number: int, kind: Kind, where: Where, begin: int, end: int) -> Iterator[Intruder]:
        """Its job is over after the block."""
        proxy, monitor = self.world.proxy, self.world.vm.monitor
        arguments = {name.replace("_", "-"): value for name, value in self.foreign_arguments(number, where).items()}
        hook, proxy.on_command = proxy.on_command, Intruder(monitor, kind, arguments, begin, end)
        intruder = proxy.on_command
        try:
            yield intruder
        finally:
            proxy.on_command = hook
            self.portal.call(intruder.stop)
            if not intruder.began:
                self.world.qmp("blockdev-del", node_name=arguments["target"])
