# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules: what the guest does to its disks."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.machine.base import CHUNK, Base

UNIT = 4096
COMMANDS = ("write -P {pattern}", "write -z", "write -z -u", "discard")


class Writes(Base):
    """Half of the writes touch a chunk, the others as much as they like."""

    @rule(
        number=st.integers(0, 1),
        where=st.floats(0, 1, exclude_max=True),
        units=st.sampled_from([1, 1, 2, 16, 17, 64]),
        kind=st.sampled_from(COMMANDS),
    )
    @precondition(lambda self: self.world.plugged)
    def write(self, number: int, where: float, units: int, kind: str) -> None:
        slot = self.slot(number)
        assert slot
        size = self.world.block(slot)["inserted"]["image"]["virtual-size"]
        start = int(where * (size // UNIT)) * UNIT
        length = min(units * UNIT, size - start)
        self.world.io(slot, f"{kind.format(pattern=self.world.number() % 251 + 1)} {start} {length}")

    @rule(number=st.integers(0, 1), chunks=st.integers(4, 48))
    @precondition(lambda self: self.world.plugged)
    def resize(self, number: int, chunks: int) -> None:
        """Refused where a job runs or a mount is. A cut ends with a chunk, for a smaller one leaves no trace."""
        slot = self.slot(number)
        assert slot
        block = self.world.block(slot)
        node = block["device"] or block["inserted"]["node-name"]
        name = {"device": node} if block["device"] else {"node_name": node}
        self.world.refused("block_resize", size=chunks * CHUNK, **name)
