# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which process is a domain's QEMU: libvirt does not tell, but every process shows what it was called with."""

from __future__ import annotations

from contextlib import suppress

from qfsbackup.patience import NoAnswerError, in_time
from qfsbackup.vm.presence import processes_with

PROC_TIMEOUT = 5.0  # seconds; reading a command line may wait for the process's memory (proc(5))


async def process_of(uuid: str) -> int:
    """The process id of the QEMU with this uuid, 0 where none, or more than one, is to be seen."""
    with suppress(NoAnswerError):
        found = await in_time(lambda: processes_with(b"\0-uuid\0" + uuid.encode() + b"\0"), PROC_TIMEOUT)
        return found[0] if len(found) == 1 else 0
    return 0
