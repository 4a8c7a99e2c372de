# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is known of an NBD export before it is opened: by whoever has it served, and by its server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qfsbackup.ranges import RangeSet


@dataclass(frozen=True, slots=True)
class Export:
    """One disk of a snapshot, as an NBD server offers it."""

    disk: str  # the disk's name
    uri: str  # where libnbd connects to, export name included
    size: int
    dirty_context: str | None = None  # NBD meta context that marks dirty extents; None: everything is dirty
    request_unit: int | None = None  # no read may cross a multiple of this: it could return what was written since
    copied: Callable[[], RangeSet] | None = None  # data that may be reported as zero: look after asking, in a thread
    allocation: bool = True  # may the server be asked what is zero
    low_water: int | None = None  # from here on all is dirty, whatever the context says: the disk was resized


@dataclass(frozen=True, slots=True)
class Offer:
    """One export of an NBD server, as the server itself describes it."""

    name: str  # empty: the server's default export
    uri: str  # of this export
    size: int
    can_trim: bool
    contexts: tuple[str, ...]  # the NBD meta contexts it has
