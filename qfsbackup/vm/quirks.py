# SPDX-License-Identifier: LGPL-2.1-or-later
"""What depends on QEMU's version, each fact with its source: the only place that compares versions.

What holds of one version only and is kept to with all, since an NBD server tells no version, stands where it is done:
- 7.1 to 7.2.14 and 8.0 to 9.1: overlapping reads of a snapshot abort QEMU (block/reqlist.c): nbd/inflight.
- before 9.1: a trim that is not aligned to copy-before-write's clusters aborts QEMU (hbitmap_reset): nbd/disk, and
  facts.CLUSTER for the unit, block/copy-before-write.c.
- from 7.2.14 on: an NBD server takes 100 connections unless told otherwise: vm/server, facts.CONNECTIONS.
- before 11.0.1: a discard that races an allocating write corrupts qcow2: vm/fleecing, whose files are raw.
"""

from __future__ import annotations

from qfsbackup.facts import CLUSTER

Version = tuple[int, int, int]
OLDEST = (7, 1, 0)  # copy-before-write has on-cbw-error since: a guest is safe from backup errors
CBW_TIMEOUT = 45  # seconds a guest write may wait for the fleecing file; virtio-win resets a disk after 60


def text(version: Version) -> str:
    """As a person writes it."""
    return ".".join(map(str, version))


def request_unit(version: Version) -> int | None:
    """Bytes; a request must not cross a multiple of it, or its answer may be wrong.

    Before 8.0 a request that begins in an overwritten cluster and ends in one that is not is answered with what the
    guest has written since (hbitmap_status, fixed by a4d5224c2c and never in 7.2's stable releases; seen with 7.2.22).
    """
    return CLUSTER if version < (8, 0, 0) else None


def tells_allocation(version: Version) -> bool:
    """May block status be asked for through snapshot-access: else an assertion on RECURSE and ZERO in block/io.c aborts
    QEMU."""
    aborts = (((7, 1, 0), (7, 2, 9)), ((8, 0, 0), (8, 1, 5)), ((8, 2, 0), (8, 2, 1)))  # from .. fixed in
    return not any(first <= version < fixed for first, fixed in aborts)


def cbw_timeout(version: Version) -> int:
    """Seconds for `cbw-timeout`. Before 9.1 it is kept as nanoseconds in 32 bits (block/copy-before-write.c)."""
    return CBW_TIMEOUT if version >= (9, 1, 0) else 4


def jobs_break_the_snapshot(version: Version) -> bool:
    """Has `blockdev-backup` on-cbw-error: before 10.1 ("Parameter 'on-cbw-error' is unexpected", 10.0.2) the guest sees
    what goes wrong with the fleecing file."""
    return version >= (10, 1, 0)


def survives_iothread(version: Version) -> bool:
    """Else QEMU aborts when an NBD client leaves an export in an iothread: the backport of CVE-2024-7409's fix, until
    f816310d0c."""
    return not (7, 2, 14) <= version < (8, 2, 0)


def keeps_fdsets(version: Version) -> bool:
    """Does a VM that does not run keep removed fdsets (monitor_fdset_cleanup; seen with 7.2.22, not with 10.0.2)."""
    return version < (9, 0, 0)
