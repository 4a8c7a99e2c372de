# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules: mount, let the target's tools run, commit, roll back, forget."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from qfsbackup.errors import EXIT_MOUNT
from qfsbackup.vm.quirks import jobs_break_the_snapshot
from qfsbackup.vm.recipes import RECIPES
from tests.harness.mount import DONE, aside
from tests.machine.base import TARGETS, Base
from tests.machine.tools import Tools

WHOLE, DIRTY, RELEASE = "access=full", "access=dirty", "discard=release"
OPTIONS = st.sampled_from([WHOLE, WHOLE, WHOLE, DIRTY, RELEASE])


@contextlib.contextmanager
def fifos(says: Path, hears: Path) -> Iterator[int]:
    """Two FIFOs, and a descriptor that can be read once somebody writes into the first."""
    for path in (says, hears):
        os.mkfifo(path)
    descriptor = os.open(says, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
        for path in (says, hears):
            path.unlink()


class Backups(Base):
    """Every mount shows each disk at its instant; what a whole run of a tool leaves is the disk."""

    @rule(to=st.sampled_from([None, *TARGETS, *TARGETS]), option=OPTIONS)
    @precondition(lambda self: not self.mounted)
    def mount(self, to: str | None, option: str) -> None:
        with self.others_see_nothing():
            command = self.try_mount(to, option)
        if command.ready:
            assert self.world.plugged
            assert not self.jobs
            self.shows_the_instant()
            return
        refused = command.wait()
        assert self.jobs or not self.world.plugged, refused.stderr
        assert refused.code == EXIT_MOUNT, refused
        if self.dead and self.jobs:
            return  # a job that uses the dead mount's filter keeps it there
        self.dead = False
        self.nothing_is_left(refused.stderr)

    def shows_the_instant(self) -> None:
        assert self.mounted
        mounted = self.mounted
        assert {disk["name"] for disk in mounted.facts["disks"]} == mounted.truth.keys(), mounted.facts
        for name, content in mounted.truth.items():
            if mounted.option != DIRTY:
                assert self.portal.call(aside, (self.mountpoint / f"images/{name}.raw").read_bytes) == content, name
            self.delta_applies(name, content)

    def delta_applies(self, name: str, content: bytes) -> None:
        """What changed, put over what was committed, is the disk."""
        assert self.mounted
        [disk] = [disk for disk in self.mounted.facts["disks"] if disk["name"] == name]
        if not self.mounted.target or disk["bitmap"] != "reuse":
            return
        delta = self.portal.call(aside, (self.mountpoint / f"delta/{name}.raw").read_bytes)
        extents = [extent for extent in self.load(f"maps/{name}.json") if extent["type"]]
        results = []
        for base in self.bases[self.mounted.target].contents:
            made = bytearray(base.get(name, b"").ljust(len(content), b"\0")[: len(content)])
            for extent in extents:
                start, end = extent["offset"], extent["offset"] + extent["length"]
                made[start:end] = delta[start:end]
            results.append(bytes(made) == content)
        assert any(results), f"{name}: its delta applies on no base"

    @rule(last=st.sampled_from([None, None, None, 10, 40]))
    @precondition(lambda self: self.mounted and self.mounted.target and not self.mounted.gone)
    def take(self, last: int | None) -> None:
        """The tools run, to the end or until somebody ends them.

        With access=dirty they are refused what they would read for another reason than that it changed: they have
        none yet, or have seen a mount that was not committed. With discard=release nothing can be read twice, which
        tar does with chunks whose time is not before its start.
        """
        assert self.mounted
        assert self.mounted.target
        tools = self.tools[self.mounted.target]
        try:
            self.portal.call(aside, partial(tools.take, self.mountpoint / "chunks", self.commands.now(), last))
        except OSError:
            assert self.mounted.option == DIRTY or (self.mounted.option == RELEASE and self.mounted.read)
            return
        finally:
            self.mounted.read = True
        if last is None:
            self.mounted.whole = True
            self.copies_are_right(tools, self.mounted.truth)

    def copies_are_right(self, tools: Tools, truth: Mapping[str, bytes]) -> None:
        for copy in tools.copies:
            assert copy.disks().keys() == truth.keys()
            for name, content in truth.items():
                assert copy.disks()[name] == content, f"{copy.name}'s copy of {name} is wrong"

    @rule()
    @precondition(lambda self: self.mounted and self.mounted.whole)
    def commit(self) -> None:
        assert self.mounted
        assert self.mounted.target
        with self.others_see_nothing():
            result = self.commands.run("commit", self.mountpoint)
        if self.mounted.gone:
            assert self.mounted.committed or result.code == 2, result
            return
        assert result == DONE
        self.mounted.committed = True
        self.bases[self.mounted.target].contents = [self.mounted.truth]

    @rule()
    @precondition(lambda self: self.mounted)
    def umount(self) -> None:
        self.end()

    @rule(to=st.sampled_from(TARGETS), committed=st.booleans())
    @precondition(lambda self: not self.jobs and self.world.plugged)
    def back_up(self, to: str, committed: bool) -> None:
        """All of it at once."""
        if self.mounted:
            self.end()
        self.mount(to, WHOLE)
        self.take(None)
        if committed:
            self.commit()
        self.end()

    @rule(to=st.sampled_from(TARGETS))
    @precondition(lambda self: not self.jobs and self.world.plugged)
    def back_up_and_commit(self, to: str) -> None:
        """The same; rules are drawn with equal chances, and this one matters most."""
        self.back_up(to, committed=True)

    @rule(to=st.sampled_from(TARGETS), code=st.sampled_from([0, 0, 1]))
    @precondition(lambda self: not self.mounted and not self.jobs and self.world.plugged)
    def run(self, to: str, code: int) -> None:
        """The same by the command that does it; a tool that fails is not committed."""
        truth = self.truth()
        says, hears = self.folder / "says", self.folder / "hears"
        script = f"echo > {says}; exit $(cat {hears})"
        words = "run", self.world.socket, "-o", self.options(to), "--mountpoint", self.mountpoint
        with fifos(says, hears) as said, self.others_see_nothing():
            command = self.commands.start(*words, "--", "/bin/sh", "-c", script)
            assert command.until(said), command.wait()
            self.dead = False
            self.portal.call(aside, partial(self.tools[to].take, self.mountpoint / "chunks", self.commands.now()))
            hears.write_text(f"{code}\n")
            result = command.wait()
        assert result.code == code, result
        self.copies_are_right(self.tools[to], truth)
        if code == 0:
            self.bases[to].contents = [truth]
        self.nothing_is_left(result.stderr)

    @rule(recipe=st.sampled_from([*RECIPES]))
    @precondition(lambda self: jobs_break_the_snapshot(self.qemu.version))
    def choose_recipe(self, recipe: str) -> None:
        """For the mounts to come."""
        self.recipe = recipe

    @rule(seconds=st.sampled_from([-3600, -5, -1, 1, 60]))
    def set_the_clock(self, seconds: int) -> None:
        """Back or on; only the product's own clock."""
        self.commands.clock += seconds

    @rule()
    @precondition(lambda self: not self.mounted)
    def clean_up(self) -> None:
        if self.dead:
            subprocess.run(["umount", "-l", self.mountpoint], check=False, capture_output=True)
        with self.others_see_nothing():
            result = self.commands.run("cleanup", self.world.socket, "-o", self.options(None))
            if self.dead and self.jobs and result.code == EXIT_MOUNT:
                return
            assert result.code == 0, result
            self.dead = False
        self.nothing_is_left(result.stderr)

    @rule(to=st.sampled_from(TARGETS))
    @precondition(lambda self: not self.mounted and not self.dead)
    def forget(self, to: str) -> None:
        words = "checkpoints", self.world.socket, "-o", self.options(None)
        known = self.commands.run(*words)
        assert known.code == 0, known
        with self.others_see_nothing():
            result = self.commands.run(*words, "--delete", to)
        lines = [line.split("  ") for line in known.stdout.splitlines()]
        lines = [words for words in lines if words[0] == to and not words[1].startswith("the bitmap")]
        assert result.code == (0 if lines else 1), (known, result)
        self.bases[to].contents = []
