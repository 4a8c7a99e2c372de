# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all rules share: a VM, the mount that there may be, the copies of each target's tools, and what must hold."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hypothesis.stateful import RuleBasedStateMachine

from qfsbackup.errors import EXIT_SYSTEM
from tests.harness.monitor import Monitor
from tests.harness.mount import aside, is_mounted
from tests.harness.qemu import Qemu
from tests.machine.commands import Command, Commands
from tests.machine.portal import Portal
from tests.machine.tools import Tools
from tests.machine.view import below, checkpoints, foreign, left
from tests.machine.world import Flavour, Slot, World

TARGETS = ("nas", "usb")
CHUNK = 64 * 1024


@dataclass
class Mounted:
    """A mount that was ready."""

    command: Command
    target: str | None
    option: str  # that was given besides
    truth: dict[str, bytes] = field(repr=False)  # each disk at the instant, by its name
    facts: dict[str, Any]  # vm.json
    bitmaps: set[str]  # the names of all that were ours before
    read: bool = False  # have the target's tools run
    whole: bool = False  # has the target's tools' run been a whole one
    gone: bool = False  # was QEMU switched off meanwhile
    disturbed: bool = False  # has a disk got another top node meanwhile
    committed: bool = False


@dataclass
class Bases:
    """What `delta/` may apply on: the contents of the last commits of a target, one or, after a kill, two."""

    contents: list[dict[str, bytes]] = field(default_factory=list, repr=False)


async def end_job(monitor: Monitor, job: str, target: str) -> None:
    """Cancel a block job, and remove the node that it wrote to."""
    await monitor.execute("job-cancel", id=job)
    await monitor.event("JOB_STATUS_CHANGE", id=job, status="null")
    await monitor.execute("blockdev-del", node_name=target)


class Base(RuleBasedStateMachine):
    """No rules here. The class variables are set by the test, in a class of its own."""

    qemu: ClassVar[Qemu]
    flavour: ClassVar[Flavour]
    portal: ClassVar[Portal]
    commands: ClassVar[Commands]

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="qfsm-", dir="/dev/shm"))
        self.mountpoint = self.folder / "mnt"
        self.mountpoint.mkdir()
        (self.folder / "state").mkdir(mode=0o700)
        self.commands.clock = 0
        self.world = World(self.portal, self.qemu, self.folder, self.flavour)
        self.mounted: Mounted | None = None
        self.dead = False  # were both processes of a mount killed
        self.status = ""  # the VM's run state before they were
        self.recipe = "filters"  # of the next mount
        self.jobs: dict[str, str] = {}  # others' block jobs, by id; the node that the job writes to
        self.tools = {target: Tools() for target in TARGETS}
        self.bases = {target: Bases() for target in TARGETS}
        self.world.start()

    def teardown(self) -> None:
        try:
            if self.mounted:
                self.end()
            if self.world.on:
                self.world.stop()
        finally:
            if is_mounted(self.mountpoint):
                subprocess.run(["umount", "-l", self.mountpoint], check=False)
            shutil.rmtree(self.folder)

    # ---- what rules are made of ----

    def slot(self, number: int) -> Slot | None:
        """One of the plugged disks, if there is any."""
        plugged = self.world.plugged
        return plugged[number % len(plugged)] if plugged else None

    def root(self, slot: Slot) -> str:
        """The node that the device is attached to; where that is our filter, what this stands on."""
        name: str = self.world.block(slot)["inserted"]["node-name"]
        return below(self.world, name)

    def truth(self) -> dict[str, bytes]:
        """The content of each disk that the guest has, by its name."""
        return {self.world.name(slot): self.world.content(slot) for slot in self.world.plugged}

    def options(self, target: str | None, option: str = "") -> str:
        """What stands behind -o."""
        place = [f"state={self.folder / 'state'}", f"fleece={self.folder}", "vm=web1", f"chunk={CHUNK}"]
        place.append(f"recipe={self.recipe}")
        return ",".join(word for word in [*place, option, f"target={target}" if target else ""] if word)

    def load(self, path: str) -> Any:
        """A JSON file of the mount."""
        return json.loads(self.portal.call(aside, (self.mountpoint / path).read_bytes))

    @contextlib.contextmanager
    def others_see_nothing(self, *, dead: bool = False) -> Iterator[None]:
        """What is not ours is after the block as it was before, unless QEMU is gone.

        Where both processes of a mount were killed (`dead`), the guest may be stopped until somebody cleans up.
        """
        before = foreign(self.world) if self.world.on else {}
        if self.dead:
            before["status"] = self.status
        self.status = before.get("status", "")
        yield
        after = foreign(self.world) if self.world.on else {}
        changed = {key: (before[key], after.get(key)) for key in before if before[key] != after.get(key)}
        if dead or self.dead:
            changed.pop("status", None)
        assert not changed, f"what is not ours was, and is now: {changed}"

    # ---- the mount's life ----

    def try_mount(self, target: str | None, option: str = "") -> Command:
        """Mount; a mount that is ready is `mounted`."""
        truth, bitmaps = self.truth(), self.bitmaps()
        command = self.commands.mount(self.world.socket, self.mountpoint, "-o", self.options(target, option))
        if command.ready:
            self.dead = False
            self.mounted = Mounted(command, target, option, truth, self.load("vm.json"), bitmaps)
        return command

    def bitmaps(self) -> set[str]:
        """The names of all bitmaps of ours."""
        return {name for names in checkpoints(self.world).values() for name in names} if self.world.on else set()

    def end(self) -> None:
        """Unmount. Where a job of others uses our filter, that is said; once it is over nothing of ours is left."""
        assert self.mounted
        mounted, self.mounted = self.mounted, None
        with self.others_see_nothing():
            result = self.commands.run("umount", self.mountpoint)
        if self.jobs and result.code == EXIT_SYSTEM:
            assert result.stderr.startswith("unmounted, but "), result
            self.foreign_job_ends()
            self.ended(mounted, EXIT_SYSTEM)
        elif mounted.gone:
            assert result.code in (0, EXIT_SYSTEM), result
            self.ended(mounted, EXIT_SYSTEM)
        else:
            assert result.code == 0, (result, mounted.command.err.read_text())
            self.ended(mounted, 0)

    def ended(self, mounted: Mounted, code: int) -> None:
        """The mount's processes end with this exit status, and all is as it should be."""
        with self.others_see_nothing():
            result = mounted.command.wait()
        assert result.code == code, result.stderr
        self.nothing_is_left(result.stderr)
        self.bitmaps_are_right(mounted)

    def foreign_job_ends(self) -> None:
        """The job that there is."""
        for job, target in self.jobs.items():
            self.portal.call(end_job, self.world.vm.monitor, job, target)
        self.jobs.clear()

    def nothing_is_left(self, log: str) -> None:
        """No mount, and in QEMU nothing of ours but bitmaps."""
        assert not is_mounted(self.mountpoint), log
        found = left(self.world) if self.world.on else []
        assert not found, f"ours is still there: {found}\n{log}"

    def bitmaps_are_right(self, mounted: Mounted) -> None:
        """A mount that is over added none unless it was committed; then they replace those of the target."""
        if mounted.gone:
            return
        if not mounted.committed:
            added, log = self.bitmaps() - mounted.bitmaps, mounted.command.err.read_text()
            found = checkpoints(self.world, writable=True) if added else {}
            assert added.isdisjoint(name for names in found.values() for name in names), (added, log)
            named = log.partition("but for what it does not remove: ")[2]  # an image that became read-only meanwhile
            assert all(name.removesuffix(".low") in named for name in added), (added, log)
        elif not mounted.disturbed:
            assert mounted.target
            begun = {disk["name"] for disk in mounted.facts["disks"] if disk["generation"]}
            roots = {self.root(slot) for slot in self.world.plugged if self.world.name(slot) in begun}
            found = checkpoints(self.world, mounted.target, writable=True)
            stale = {name for root in roots for name in found.get(root, set()) & mounted.bitmaps}
            assert not stale, f"not the last commit's, and still there: {stale}"
