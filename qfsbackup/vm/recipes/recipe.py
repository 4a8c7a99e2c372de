# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a recipe is to others. Each is a module of this folder with these names in it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from qfsbackup.vm.monitor import Monitor
from qfsbackup.vm.quirks import Version
from qfsbackup.vm.second_look import Filtered
from qfsbackup.vm.transaction import Actions


@dataclass(frozen=True, slots=True)
class Bitmaps:
    """What becomes of the bitmaps at the instant: what `begun` holds was written since, what `copied` copies before."""

    begun: Actions
    copied: Actions


@dataclass(frozen=True, slots=True)
class Moment:
    """`instant` is in nanoseconds since the epoch; every write before it is in the snapshot."""

    instant: int
    pause_ms: float = 0.0  # how long the guest's CPUs stood still


class Recipe(Protocol):
    """Of its functions those that undo never raise QmpError: what stays is for `left` to see."""

    def check(self, version: Version) -> None:
        """Raise UserError where this QEMU cannot do it."""
        ...

    def filter_name(self, number: int) -> str:
        """The node that stands on a disk's root node during a snapshot, and that snapshot-access stands on."""
        ...

    def standing(self, qmp: Monitor, version: Version, disks: Sequence[Filtered]) -> AbstractAsyncContextManager[None]:
        """All that QEMU can refuse, of which the guest notices nothing; at the end the snapshot is taken down.

        Raises QmpError.
        """
        ...

    async def switch(self, qmp: Monitor, disks: Sequence[Filtered], bitmaps: Bitmaps, *, frozen: bool) -> Moment:
        """From now on, at one instant for all disks, what the guest overwrites is copied first. Nothing is undone here.

        `frozen`: no guest writes just now. Raises UserError, QmpError.
        """
        ...

    def watched(
        self, qmp: Monitor, disks: Sequence[Filtered], lost: Callable[[str], None]
    ) -> AbstractAsyncContextManager[None]:
        """From here to the end of the block `lost` hears why the snapshot is none any more, if somebody took it down.

        Raises UserError where that has happened already, QmpError.
        """
        ...

    async def free_guest(self, qmp: Monitor, ours: Collection[str]) -> list[str]:
        """Clean-up: end what holds the guest up, and tell what that was. `ours` are the names of all nodes of ours."""
        ...

    async def take_down(self, qmp: Monitor, ours: Collection[str]) -> None:
        """Clean-up: end what copies and is among `ours`. The guest has its disks again."""
        ...
