# SPDX-License-Identifier: LGPL-2.1-or-later
"""Is the snapshot of a mount still whole? Once it is broken it stays so, and every read of every disk fails from then
on: a backup that misses a piece must not look like one that does not.
"""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)


class Health:
    """One mount's; whoever learns that a piece is lost says so here."""

    def __init__(self) -> None:
        self.broken: str | None = None  # why the snapshot can no longer be read

    def mark_broken(self, reason: str) -> None:
        """Every read fails from now on. The first reason stays."""
        if self.broken is None:
            self.broken = reason
            log.error("the snapshot is broken: %s; every read fails from now on", reason)
