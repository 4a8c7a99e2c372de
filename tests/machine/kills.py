# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules: SIGKILL for the worker, the supervisor or both, when a QMP command that changes something should pass."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterator
from typing import Any, Literal

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.faults.support import ended, kill_at_once, looks, parent
from tests.harness.qmp_proxy import Proxy
from tests.machine.backups import Backups
from tests.machine.base import TARGETS
from tests.machine.commands import TIMEOUT, Command

Victim = Literal["worker", "supervisor", "both"]
VICTIMS = st.sampled_from(["worker", "supervisor", "both", "both"])
EXITS = {"worker": 128 + signal.SIGKILL, "supervisor": -signal.SIGKILL, "both": -signal.SIGKILL}


class Trap:
    """A hook for the QMP proxy: kills at the command of this number, counted from 0."""

    def __init__(self, proxy: Proxy, victim: Victim, number: int) -> None:
        self._proxy, self.victim, self._number = proxy, victim, number
        self.worker: int | None = None  # a pidfd, once the trap was sprung

    async def __call__(self, name: str, _arguments: dict[str, Any]) -> None:
        if self.worker is not None or looks(name):
            return
        self._number -= 1
        if self._number < 0:
            worker, supervisor = self._proxy.client, parent(self._proxy.client)
            self.worker = os.pidfd_open(worker)
            victims = {"worker": [worker], "supervisor": [supervisor], "both": [worker, supervisor]}[self.victim]
            async with ended(victims):
                kill_at_once(victims)


class Kills(Backups):
    """Who is left puts the VM back; where nobody is, the next mount or `cleanup` does."""

    @rule(to=st.sampled_from([None, *TARGETS]), victim=VICTIMS, number=st.integers(0, 25))
    @precondition(lambda self: not self.mounted and not self.jobs and self.world.plugged)
    def kill_while_mounting(self, to: str | None, victim: Victim, number: int) -> None:
        with self.others_see_nothing(dead=victim == "both"), self.trap(victim, number) as trap:
            command = self.try_mount(to)
            self.settle(trap, command)
        if self.mounted:
            self.shows_the_instant()

    @rule(victim=VICTIMS, number=st.integers(0, 4))
    @precondition(lambda self: self.mounted and self.mounted.whole and not self.mounted.gone and not self.jobs)
    def kill_while_committing(self, victim: Victim, number: int) -> None:
        assert self.mounted
        assert self.mounted.target
        mounted, bases = self.mounted, self.bases[self.mounted.target]
        with self.others_see_nothing(dead=victim == "both"), self.trap(victim, number) as trap:
            result = self.commands.run("commit", self.mountpoint)
            self.settle(trap, mounted.command)
        if self.mounted:
            assert result.code == 0, result
            mounted.committed = True
            bases.contents = [mounted.truth]
        else:
            bases.contents.append(mounted.truth)

    @rule(victim=VICTIMS, number=st.integers(0, 20))
    @precondition(lambda self: self.mounted and not self.mounted.gone and not self.jobs)
    def kill_while_leaving(self, victim: Victim, number: int) -> None:
        assert self.mounted
        mounted, self.mounted = self.mounted, None
        with self.others_see_nothing(dead=victim == "both"), self.trap(victim, number) as trap:
            self.commands.run("umount", self.mountpoint)
            self.settle(trap, mounted.command)
            if trap.worker is None:
                ended = mounted.command.wait()
                assert ended.code == 0, ended
        if not self.dead:
            self.nothing_is_left(mounted.command.err.read_text())

    @contextlib.contextmanager
    def trap(self, victim: Victim, number: int) -> Iterator[Trap]:
        """Armed for the length of the block."""
        proxy = self.world.proxy
        trap, hook = Trap(proxy, victim, number), proxy.on_command
        proxy.on_command = trap
        try:
            yield trap
        finally:
            proxy.on_command = hook
            if trap.worker is not None:
                os.close(trap.worker)

    def settle(self, trap: Trap, command: Command) -> None:
        """Where somebody was killed: wait for the end of all of the mount's processes, and of what they undo."""
        if trap.worker is None:
            return
        self.mounted = None
        found, _, _ = select.select([trap.worker], [], [], TIMEOUT)
        assert found, f"the worker has not ended:\n{command.err.read_text()}"
        result = command.wait()
        assert result.code == EXITS[trap.victim], result
        if trap.victim == "both":
            self.dead = True
        elif trap.victim == "worker" or not self.dead:  # else it may have ended before it had cleaned up after another
            self.nothing_is_left(result.stderr)
