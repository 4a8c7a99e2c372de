# SPDX-License-Identifier: LGPL-2.1-or-later
"""One run of one contender: its figure, the CPU time that it cost whom, and the memory that it took.

The kernel's caches are dropped before, so that nobody reads what a run before had read.
"""

import os
import resource
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .scale import MIB

TICKS = os.sysconf("SC_CLK_TCK")
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
ALL_CACHES = "3"  # pages, dentries and inodes (Linux, admin-guide/sysctl/vm.rst)
RESET_PEAK = "5"  # proc(5), clear_refs


@dataclass(frozen=True)
class Outcome:
    """What an action found: its figure in the row's unit, and the bytes that it read for that."""

    value: float
    size: float


@dataclass(frozen=True)
class Sample:
    """One run. CPU in seconds: of the contender's own processes, of QEMU, and of the commands that read."""

    value: float
    size: float
    own: float
    qemu: float
    reader: float
    peak: float  # MiB of memory, the most at any time, of the contender's own processes together


Action = Callable[[], Awaitable[Outcome]]


async def measure(action: Action, own: Sequence[int], qemu: int) -> Sample:
    """Run `action` and look what it cost. `own` are the contender's processes, `qemu` is the VM's."""
    DROP_CACHES.write_text(ALL_CACHES)  # noqa: ASYNC240 - the kernel's, returns at once
    for pid in own:
        Path(f"/proc/{pid}/clear_refs").write_text(RESET_PEAK)  # noqa: ASYNC240 - as above
    before = _cpu(own), _cpu([qemu]), _children()
    outcome = await action()
    after = _cpu(own), _cpu([qemu]), _children()
    mine, qemus, readers = (end - begin for begin, end in zip(before, after, strict=True))
    return Sample(outcome.value, outcome.size, mine, qemus, readers, sum(map(_peak, own)))


def _cpu(pids: Sequence[int]) -> float:
    return sum(_process_cpu(pid) for pid in pids)


def _process_cpu(pid: int) -> float:
    """utime + stime of all threads (proc(5), /proc/PID/stat, fields 14 and 15; the second one may hold blanks)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _peak(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / MIB
    raise LookupError(f"process {pid} has no VmHWM")
