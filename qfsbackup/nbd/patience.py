# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether to wait for a small read on the spot, instead of going through the event loop.

Two trips through the loop cost a lone random reader more than a quick server's answer does. With several readers the
same wait would line up what could run side by side, and with a slow server it would hold up everybody. So now and then
a few reads go without waiting, to see whether others come meanwhile.
"""

from __future__ import annotations

ON_THE_SPOT = 64  # reads waited for before looking around again
LOOK_AROUND = 4  # reads not waited for, to see whether others come
CROWD = 64  # reads not waited for after others came
LATE = 1000  # reads not waited for after an answer that took too long


class Patience:
    """What the last reads of a disk taught."""

    def __init__(self) -> None:
        self._on_the_spot = 0
        self._without = LOOK_AROUND

    def waits(self) -> bool:
        """Should this read, which is alone, be waited for on the spot."""
        if self._without:
            self._without -= 1
            return False
        self._on_the_spot += 1
        if self._on_the_spot == ON_THE_SPOT:
            self._on_the_spot, self._without = 0, LOOK_AROUND
        return True

    def others_came(self) -> None:
        """There is more than one read at once."""
        self._without = max(self._without, CROWD)

    def was_late(self) -> None:
        """The answer did not come in time."""
        self._without = LATE
