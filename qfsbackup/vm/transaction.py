# SPDX-License-Identifier: LGPL-2.1-or-later
"""QMP's `transaction`: all of its actions or none, those on bitmaps without a write of the guest in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qfsbackup.vm.monitor import Monitor

Actions = Sequence[Mapping[str, object]]


async def transact(qmp: Monitor, *actions: Actions) -> None:
    """In this order; nothing where there are none. Raises QmpError."""
    together = [action for some in actions for action in some]
    if together:
        await qmp.execute("transaction", {"actions": together})
