# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a tool that skips unchanged files holds after a commit is the disk, whatever happened before.

A machine writes, is resized and restarted; two targets back it up, each with a tool of its own: mounts are read whole
or in part, committed, rolled back or killed at any point; the state is lost, the clock set back. Store, times and tree
are the real ones; the disk's bytes are in memory, and its bitmaps are modelled as QEMU has them: what a resize cuts
off or adds is not marked.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from qfsbackup.contracts import Snapshot
from qfsbackup.facts import Base, count
from qfsbackup.fs.description import Look
from qfsbackup.fs.grid import Grid, cut
from qfsbackup.fs.tree import ShownDisk, build_tree
from qfsbackup.ranges import RangeSet
from qfsbackup.state.store import DiskState, Store, open_store
from qfsbackup.status import Status
from qfsbackup.vm.bitmaps.low_water import low_water
from tests.fs.memory import MemoryDisk, frozen
from tests.fs.model import CHUNK, LARGEST, SECOND, Mount, Since, Tool, walk

SMALLEST = CHUNK // 2
TARGETS = ("nas", "usb")
UUID = "6d3a5b5e-4c55-4c5f-9d3c-1d1f0a4f7f00"


class Machine(RuleBasedStateMachine):
    """`lossy`: the state may be lost, and the clock set back after it, which a look at inodes alone could notice."""

    lossy = True

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="qfsbackup-model-", dir="/dev/shm"))
        self.random = random.Random(1)
        self.content = bytearray(self.random.randbytes(3 * CHUNK + 512))
        self.clock = 1_700_000_000 * SECOND
        self.ticks = 0
        self.bitmaps: dict[tuple[str, str], RangeSet] = {}
        self.left: dict[tuple[str, str], int] = {}  # bytes of the low-water marks
        self.mounts: dict[str, Mount] = {}
        self.generations = 0
        self.tools = {name: [Tool(whole=True)] + ([] if self.lossy else [Tool(whole=False)]) for name in TARGETS}
        self.since = {name: Since() for name in TARGETS}

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    # ---- the VM ----

    @rule(where=st.floats(0, 1), length=st.integers(1, 2 * CHUNK), zero=st.booleans())
    def write(self, where: float, length: int, zero: bool) -> None:
        start = int(where * max(len(self.content) - 1, 0))
        end = min(start + length, len(self.content))
        self.content[start:end] = bytes(end - start) if zero else self.random.randbytes(end - start)
        for bitmap in self.bitmaps.values():
            bitmap.add(start, end)

    @rule(sectors=st.integers(SMALLEST // 512, LARGEST // 512), whole=st.booleans())
    def resize(self, sectors: int, whole: bool) -> None:
        """A cut ends with a cluster, for a smaller one in the last cluster leaves no trace."""
        size = -(-sectors * 512 // CHUNK) * CHUNK if whole else sectors * 512
        if size < len(self.content):
            size = size // CHUNK * CHUNK
            del self.content[size:]
        self.content += bytes(size - len(self.content))
        for key, bitmap in self.bitmaps.items():
            bitmap.remove(size, LARGEST)
            self.left[key] = min(self.left[key], -(-size // CHUNK) * CHUNK)

    @rule(persistent=st.booleans())
    def restart(self, persistent: bool) -> None:
        """The mounts die with the VM; bitmaps survive a clean shutdown where the format can keep them."""
        for to in list(self.mounts):
            self.kill(to)
        if not persistent:
            self.bitmaps.clear()

    @rule(milliseconds=st.integers(1, 3_000))
    def wait(self, milliseconds: int) -> None:
        self.clock += milliseconds * 10**6
        self.ticks += milliseconds * 10**6

    @rule(seconds=st.integers(1, 5))
    def set_the_clock_back(self, seconds: int) -> None:
        self.clock -= seconds * SECOND
        for mount in self.mounts.values():
            mount.set_back = True

    @rule()
    @precondition(lambda self: self.lossy and not self.mounts)
    def lose_the_state(self) -> None:
        shutil.rmtree(self.folder)
        self.folder.mkdir()

    @rule()
    @precondition(lambda self: not self.mounts)
    def find_another_vm_of_this_name(self) -> None:
        with open_store(self.folder, None, "web1") as store:
            store.begin("nas", self.clock)
            store.commit("nas", {"vda": DiskState("other", self.clock, 0, "", CHUNK, cut(0, RangeSet(), 0).times)})

    # ---- the backups ----

    @rule(to=st.sampled_from(TARGETS))
    def mount(self, to: str) -> None:
        """What the daemon does; the old mount of this target, if there is one, is rolled back."""
        self.roll_back(to)
        with open_store(self.folder, UUID, "web1") as store:
            committed = store.disks(to).get("vda")
            self._remove_leftovers(to, store.bases(to).get("vda"))
            self.generations += 1
            generation = str(self.generations)
            self.bitmaps[to, generation] = RangeSet()
            self.left[to, generation] = -(-len(self.content) // CHUNK) * CHUNK
            self.mounts[to] = self._show(store, to, generation, committed)

    def _remove_leftovers(self, target: str, base: Base | None) -> None:
        for key in list(self.bitmaps):
            if key[0] == target and (base is None or key[1] != base.generation):
                del self.bitmaps[key]

    def _show(self, store: Store, target: str, generation: str, committed: DiskState | None) -> Mount:
        size, instant = len(self.content), self.clock
        dirty = self.bitmaps.get((target, committed.generation)) if committed else None
        dirty = RangeSet([(0, size)]) if dirty is None else dirty.copy()
        base = Grid(committed.size, committed.chunk, committed.times) if committed else None
        if committed and (target, committed.generation) in self.bitmaps:
            mark = {"count": self.left[target, committed.generation], "granularity": CHUNK}
            dirty.add(low_water(mark, committed.size) or 0, size)
        time = store.begin(target, instant)
        grid = cut(size, dirty | store.uncommitted(target).get("vda", RangeSet()), time, base, CHUNK)
        store.show_uncommitted(target, {"vda": grid.changed(time)})
        disk = frozen(MemoryDisk(bytes(self.content), dirty=dirty))
        shown = ShownDisk("vda", store.disk_number("vda"), disk, grid)
        snapshot = Snapshot(vm="web1", uuid=UUID, instant=instant, disks=())
        tree = build_tree(
            snapshot, [shown], Status(), generation.encode(), Look(time, time + SECOND, store.vm_number())
        )
        return Mount(target, generation, instant, bytes(self.content), grid, tree, self.ticks)

    @rule(to=st.sampled_from(TARGETS), part=st.sampled_from([0.3, 0.8, 1.0, 1.0]), skip_missing=st.booleans())
    @precondition(lambda self: self.mounts)
    def read(self, to: str, part: float, skip_missing: bool) -> None:
        """A tool that ends early leaves some files as it held them, or (`skip_missing`) has none of the others."""
        mount = self.mounts.get(to)
        if mount is None:
            return
        files = [entry for entry in walk(mount.tree) if part == 1.0 or self.random.random() < part]
        for tool in self.tools[to]:
            for path, file in files:
                trio.run(tool.take, path, file)
            if part == 1.0 or skip_missing:
                tool.forget_others({path for path, _ in files})
        mount.read |= part == 1.0
        if part == 1.0:
            self.since[to].run(mount.tree, self.clock)
            self._compare(mount)

    def _compare(self, mount: Mount) -> None:
        assert self.lossy or self.since[mount.target].disk() == mount.content
        for tool in self.tools[mount.target]:
            assert tool.disk() == mount.content
            assert tool.held["images/vda.raw"][1] == mount.content
            assert tool.held["vm.json"][1] == mount.generation.encode()

    @rule(to=st.sampled_from(TARGETS), killed=st.sampled_from(["", "", "", "before", "between"]))
    @precondition(lambda self: any(mount.read for mount in self.mounts.values()))
    def commit(self, to: str, killed: str) -> None:
        mount = self.mounts.get(to)
        if mount is None or not mount.read:
            return
        if killed:
            self.kill(to)
        if killed == "before":
            return
        self.mounts.pop(to, None)
        with ExitStack() as stack:
            store = stack.enter_context(open_store(self.folder, UUID, "web1"))
            stack.enter_context(store.lock(to))
            old = store.bases(to).get("vda")
            grid = mount.grid
            state = DiskState(mount.generation, mount.instant, grid.size, "", grid.chunk, grid.times)
            store.commit(to, {"vda": state})
            if not killed:
                self._end(store, mount)
        if old and killed != "between":
            self.bitmaps.pop((to, old.generation), None)

    @rule(to=st.sampled_from(TARGETS), committed=st.booleans())
    def run(self, to: str, committed: bool) -> None:
        """All of it at once, so that much happens within a second."""
        self.mount(to)
        self.read(to, 1.0, skip_missing=False)
        if committed:
            self.commit(to, "")
        self.roll_back(to)

    @rule(to=st.sampled_from(TARGETS))
    def roll_back(self, to: str) -> None:
        mount = self.mounts.pop(to, None)
        if mount:
            with open_store(self.folder, UUID, "web1") as store:
                self._end(store, mount)
            self.bitmaps.pop((to, mount.generation), None)

    def _end(self, store: Store, mount: Mount) -> None:
        """As the chain reckons it: the clock may have been set back meanwhile."""
        store.end(mount.target, max(self.clock, mount.instant + self.ticks - mount.ticks))

    @rule(to=st.sampled_from(TARGETS))
    def kill(self, to: str) -> None:
        """The new bitmap stays where it is. How late a tool may have started is known if nobody set the clock back."""
        mount = self.mounts.pop(to, None)
        if mount and mount.set_back:
            self.since[to] = Since()

    @rule(to=st.sampled_from(TARGETS))
    def delete_the_checkpoint(self, to: str) -> None:
        if to not in self.mounts:
            with open_store(self.folder, UUID, "web1") as store:
                store.delete(to)


class StateIsKept(Machine):
    lossy = False


STEPS = settings(max_examples=50, stateful_step_count=30, deadline=None)


def test_what_a_tool_holds_is_the_disk_also_where_state_is_lost_and_the_clock_set_back() -> None:
    run_state_machine_as_test(Machine, settings=STEPS)


def test_what_a_tool_that_looks_at_whole_seconds_only_holds_is_the_disk() -> None:
    run_state_machine_as_test(StateIsKept, settings=STEPS)


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize("later", [0, 1, -1, -30])
def test_mounts_within_a_second_and_a_clock_set_back_deceive_no_tool(committed: bool, later: int) -> None:
    """`later`: seconds between two mounts."""
    machine = StateIsKept()
    try:
        for _ in range(4):
            machine.run("nas", committed)
            machine.write(0.0, 100, zero=False)
            machine.clock += later * SECOND
    finally:
        machine.teardown()


def test_a_lost_state_within_the_same_second_deceives_no_tool_that_looks_at_inodes() -> None:
    machine = Machine()
    try:
        for committed in (True, False, True):
            machine.run("nas", committed)
            machine.write(0.0, 100, zero=False)
            machine.lose_the_state()
    finally:
        machine.teardown()


def test_a_second_backup_reads_the_dirty_chunks_and_skips_the_others() -> None:
    """The model above would also hold if nothing were ever skipped."""
    machine = StateIsKept()
    try:
        for number in range(3):
            machine.run("nas", committed=True)
            machine.wait(60_000)
            for tool in machine.tools["nas"]:
                assert tool.skipped == number * (count(len(machine.content), CHUNK) - 1)
            machine.write(0.0, 100, zero=False)
    finally:
        machine.teardown()
