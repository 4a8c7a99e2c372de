# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules: the VM goes off and on, and what happens to its disks meanwhile."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.machine.base import Base


class Power(Base):
    """A mount that there is dies with the VM, but for its processes."""

    def off(self, *, killed: bool = False) -> None:
        self.jobs.clear()
        if self.mounted:
            self.mounted.gone = True
        self.world.stop(killed=killed)
        if self.mounted:
            self.end()

    @rule(killed=st.booleans())
    def restart(self, killed: bool) -> None:
        self.off(killed=killed)
        self.world.start()
        self.dead = False

    @rule()
    @precondition(lambda self: self.world.on and not self.dead)
    def cont(self) -> None:
        """The BIOS runs, and writes to no disk."""
        self.world.qmp("cont")

    @rule()
    @precondition(lambda self: self.world.on and not self.dead)
    def pause(self) -> None:
        self.world.qmp("stop")
