# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all that we add to a VM is called: it begins with `qfsbackup-`, and survives by that name whatever kills us.

Node names have at most 31 characters, as QEMU wants it. A bitmap is `qfsbackup-<target>-<generation>` (see
bitmaps/checkpoint), the map of an incremental backup MAP.
"""

from __future__ import annotations

PREFIX = "qfsbackup-"

# Nodes, with the disk's number; the export of a disk is PREFIX and that number.
FLEECING = f"{PREFIX}fleecing-"
ACCESS = f"{PREFIX}access-"
FILTER = f"{PREFIX}filter-"  # of recipes/filters
JOB = f"{PREFIX}job-"  # of recipes/jobs, and its block job
SIZE = f"{PREFIX}size-"  # an export, see snapshot

# Nodes that stand for a fact.
OWNER = f"{PREFIX}by-"  # + process id and its start time, hexadecimal
FROZEN = f"{PREFIX}frozen"  # the guest's file systems may be, by us
NEW = f"{PREFIX}new-"  # + a generation: its bitmaps are not committed yet (see bitmaps/leftovers)
STOPPED = f"{PREFIX}stopped"  # the guest's CPUs are, by us (see recipes/pause)
STOPS = f"{PREFIX}stops"  # below it
LOW_WATER = f"{PREFIX}low-water"  # for a moment, and a bitmap on it

MAP = f"{PREFIX}map"  # a bitmap on a node of ours
LINE = f"{PREFIX}alive"  # the owner's character device
FDSET = f"{PREFIX}fleecing"  # what fdsets say of themselves
SOCKET = f"{PREFIX}nbd"  # the NBD server's, on its way to QEMU
