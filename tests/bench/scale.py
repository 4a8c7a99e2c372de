# SPDX-License-Identifier: LGPL-2.1-or-later
"""How much is measured."""

from dataclasses import dataclass

MIB = 1024 * 1024
GIB = 1024 * MIB


@dataclass(frozen=True)
class Scale:
    """Sizes in bytes. `sparse` is the size of a disk of which `data` bytes are not zero, evenly spread in pieces."""

    rounds: int
    full: int = 4 * GIB
    sparse: int = 8 * GIB
    data: int = 1 * GIB
    piece: int = 1 * MIB  # how much data, and how much change, lies together on the sparse disk
    parallel: int = 1 * GIB  # read by parallel readers together
    random_seconds: float = 3
    guest: int = 1 * GIB  # the disk of the guest that writes
    guest_seconds: float = 10

    @property
    def space(self) -> int:
        """The bytes that a run needs at most: the images, and a copy of the sparse one as a tool makes it that sees
        no holes, which is also more than restic's repository."""
        return self.full + self.data + self.sparse + self.guest


SHORT = Scale(
    rounds=1,
    full=32 * MIB,
    sparse=64 * MIB,
    data=16 * MIB,
    parallel=8 * MIB,
    random_seconds=0.2,
    guest=32 * MIB,
    guest_seconds=0.5,
)
