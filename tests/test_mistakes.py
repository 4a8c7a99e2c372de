# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a person does wrong in the first hour: exit status, words of the message, and that nothing is left of it.

To add one, add a line below the situation it is made in. It is a line of sh, run in a folder of its own situation:

    $QMP    the VM's QMP socket
    $MNT    an empty folder to mount at

It must end with the status and say two lines on stderr, or as many as `lines` has; `words` must be part of them.
Afterwards QEMU, the mounts and the processes must be as they were before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness.qemu import Qemu
from tests.situations import Place, Situation, a_vm, no_vm


@dataclass(frozen=True)
class Mistake:
    """What was done, how it ends, and what it says."""

    line: str
    code: int
    words: Sequence[str]
    lines: int

    async def wrong(self, place: Place) -> str | None:
        """Do it; what was not as it should be."""
        before = await place.left()
        done = await place.do(self.line)
        after = await place.left()
        said = done.stderr.splitlines()
        changed = {key for key in (*before, *after) if before.get(key) != after.get(key)}
        if changed:
            return f"{self.line}\n  " + "\n  ".join(
                f"{key}: {before.get(key)}, now {after.get(key)}" for key in changed
            )
        missing = [word for word in self.words if word not in done.stderr]
        if missing or done.code != self.code or self.lines not in (ANY, len(said)) or "Traceback" in done.stderr:
            return f"{self.line}\n  status {done.code}, missing {missing}, it said:\n{done.stderr}"
        return None


def mistake(line: str, code: int, *words: str, lines: int = 2) -> Mistake:
    return Mistake(line, code, words, lines)


ANY = -1
UMOUNT = "qfsbackup umount $MNT"
CLOSED = ("<&-", ">&-", "2>&-", "<&- >&- 2>&-")

NO_VM = [
    # what the command line is
    mistake("qfsbackup", 1, "COMMAND"),
    mistake("qfsbackup fly", 1, "fly"),
    mistake("qfsbackup run a.qmp -o target=nas restic backup", 1, "no -- before restic", "qfsbackup run SOURCE -o"),
    mistake("qfsbackup run a.qmp --", 1, "no command"),
    mistake("qfsbackup run a.qmp --wrong -- true", 1, "--wrong"),
    # where the output goes
    mistake("qfsbackup status > /dev/full", 2, "cannot write the output: No space left on device"),
    mistake("qfsbackup status --json > /dev/full", 2, "cannot write the output"),
    mistake("qfsbackup --help > /dev/full", 2, "cannot write the output"),
    mistake("qfsbackup --version > /dev/full", 2, "cannot write the output"),
    mistake("qfsbackup help mount | head -n 1", 0, lines=0),
    mistake("qfsbackup status | true", 0, lines=0),
    *(mistake(f"qfsbackup status {closed}", 0, lines=0) for closed in CLOSED),
]

VM = [
    # whatever started it closed the standard descriptors
    *(
        mistake(f"qfsbackup mount $QMP $MNT {closed} && ls $MNT/images && {UMOUNT} {closed}", 0, lines=0)
        for closed in CLOSED
    ),
    mistake("qfsbackup run $QMP --mountpoint $MNT -- ls images <&-", 0, "2 disks", lines=ANY),
    mistake("qfsbackup run $QMP --mountpoint $MNT -- ls images <&- >&- 2>&-", 0, lines=0),
    mistake("qfsbackup cleanup $QMP <&- >&- 2>&-", 0, lines=0),
]

TABLE: list[tuple[Situation, list[Mistake]]] = [(no_vm, NO_VM), (a_vm, VM)]


@pytest.mark.one_qemu
@pytest.mark.parametrize(("situation", "mistakes"), TABLE, ids=[situation.__name__ for situation, _ in TABLE])
async def test_a_mistake_is_told_in_two_lines_and_leaves_nothing(
    qemu: Qemu, tmp_path: Path, situation: Situation, mistakes: list[Mistake]
) -> None:
    async with situation(qemu, tmp_path) as place:
        wrong = [found for one in mistakes if (found := await one.wrong(place))]
    assert not wrong, "\n".join(wrong)
