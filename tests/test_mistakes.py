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
from tests.situations import (
    Place,
    Situation,
    a_backup_at_work,
    a_mounted_vm,
    a_vm,
    a_vm_mounted_elsewhere,
    a_vm_of_others,
    no_vm,
)


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
RUN = "mkdir -p -m 700 state; qfsbackup run $QMP --mountpoint $MNT -o target=t,state=$PWD/state"
FORGET = "qfsbackup checkpoints $QMP -o state=$PWD/state --delete t > /dev/null"
STALE = "python3 -c 'import socket; socket.socket(1).bind(\"old\")'"
USER = "setpriv --reuid=41234 --regid=41234 --clear-groups --inh-caps=-all --"
CLOSED = ("<&-", ">&-", "2>&-", "<&- >&- 2>&-")

NO_VM = [
    # what the command line is
    mistake("qfsbackup", 1, "COMMAND"),
    mistake("qfsbackup fly", 1, "fly"),
    mistake("qfsbackup run a.qmp -o target=nas restic backup", 1, "no -- before restic", "qfsbackup run SOURCE -o"),
    mistake("qfsbackup run a.qmp --", 1, "no command"),
    mistake("qfsbackup mount a.qmp $MNT --target nas", 1, "--target nas", "-o target=..."),
    mistake("qfsbackup status --wrong", 1, "--wrong", "qfsbackup status --help"),
    mistake("qfsbackup run a.qmp --wrong -- true", 1, "--wrong"),
    # what SOURCE is not
    mistake("qfsbackup mount '' $MNT", 1, "SOURCE is empty", "NBD URI"),
    mistake("qfsbackup mount qmp: $MNT", 1, "SOURCE is empty"),
    mistake(
        "qfsbackup mount web1 $MNT", 32, "no socket web1 in this folder", "the name of a VM does not do", "libvirt:web1"
    ),
    mistake("qfsbackup run 100 -- true", 125, "no socket 100 in this folder"),
    mistake("qfsbackup mount pve:100 $MNT", 1, "no source is called pve:", "QMP socket for backups"),
    mistake("qfsbackup mount libvirt: $MNT", 1, "no domain's name", "virsh list"),
    mistake("qfsbackup mount libvirt:qemu+ssh://host/system/web1 $MNT", 1, "another host", "where the VM runs"),
    mistake("qfsbackup mount libvirt:qemu://host/system/web1 $MNT", 1, "another host", "where the VM runs"),
    mistake("qfsbackup mount libvirt:xen:///system/web1 $MNT", 1, "not QEMU's", "where the VM runs"),
    mistake("qfsbackup mount pve:100 $MNT", 1, "no source is called pve:", "QMP socket for backups"),
    mistake("qfsbackup run pve://100 -- true", 1, "no source is called pve:"),
    mistake("qfsbackup mount image:disk.qcow2 $MNT", 1, "no source is called image:", "qemu-nbd --read-only"),
    mistake("qfsbackup mount http://host/disk $MNT", 1, "no source is called http:", "nbd+unix"),
    mistake("qfsbackup mount localhost:4444 $MNT", 1, "is a host and a port", "nbd://localhost:4444"),
    mistake("qfsbackup cleanup tcp:127.0.0.1:4444", 1, "is a host and a port", "unix socket only"),
    mistake("qfsbackup mount . $MNT", 32, "is a folder", "Name the socket itself"),
    mistake("mkfifo fifo; qfsbackup mount fifo $MNT", 32, "is a file, not a VM's QMP socket"),
    mistake("echo text > file; qfsbackup mount file $MNT", 32, "is a file, not a VM's QMP socket"),
    mistake("truncate -s 1M disk.raw; qfsbackup mount disk.raw $MNT", 32, "is a disk image", "qemu-nbd --read-only"),
    mistake(
        "qemu-img create -q -f qcow2 d 1M; qfsbackup cleanup d", 32, "is a disk image", "name that VM's QMP socket"
    ),
    mistake("qfsbackup mount $QMP $MNT", 32, "No such file or directory", "Is the VM running"),
    mistake("qfsbackup run $QMP -- true", 125, "No such file or directory", "Is the VM running"),
    # what the options are
    mistake("mount.qfsbackup a.qmp $MNT -o rw,allow_other", 1, "allow_other", "uid=, gid= or mode="),
    mistake("mount.qfsbackup a.qmp $MNT -o remount,ro", 1, "cannot be mounted again", "qfsbackup umount DIR"),
    mistake("qfsbackup mount nbd://localhost/ $MNT -o discard=release", 1, "server's own data", "trim-server-data"),
    # nofail, as mount(8) says it: no error where there is no device, but one where it is something else
    mistake("mount.qfsbackup $QMP $MNT -o ro,nofail", 0, lines=0),
    mistake(f"{STALE}; mount.qfsbackup old $MNT -o nofail", 0, lines=0),
    mistake("mount.qfsbackup old $MNT -o ro", 32, "Connection refused", "is the VM running"),
    mistake("mount.qfsbackup disk.raw $MNT -o nofail", 32, "is a disk image"),
    mistake("mount.qfsbackup $QMP $MNT -o nofail,wrong", 1, "unknown option: wrong"),
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
    # what a mount is taken for
    mistake(f"qfsbackup mount $QMP $MNT -o ro && ! mkfs.ext4 -qF $MNT/images/vda.raw && {UMOUNT}", 0, lines=ANY),
    mistake(
        "qfsbackup run $QMP -o ro --mountpoint $MNT -- fallocate -p -l 1M images/vda.raw", 1, "Read-only", lines=ANY
    ),
]

VM += [
    mistake("qfsbackup mount . $MNT", 32, "is a folder, not a VM's QMP socket", "The sockets in it: ", "vm.qmp"),
    # what run is to run: found before anything is done
    mistake("qfsbackup run $QMP -- no-such-program", 125, "cannot run no-such-program: no such command", "in the PATH"),
    mistake("qfsbackup run $QMP -- 'rsync -a chunks'", 125, "no such command", "Leave the quotes out"),
    mistake("qfsbackup run $QMP -- ./no/such", 125, "cannot run ./no/such: no such file", "from where you are now"),
    mistake("echo > script; qfsbackup run $QMP -- ./script", 125, "it is not executable", "chmod +x ./script"),
    mistake("qfsbackup run $QMP -- $MNT/", 125, "it is a folder"),
    mistake("echo '#!/no/sh' > s; chmod +x s; qfsbackup run $QMP -- ./s", 125, "names /no/sh, which is not there"),
    mistake("echo x > t; chmod +x t; qfsbackup run $QMP --mountpoint $MNT -- ./t", 125, "Exec format error", lines=ANY),
    mistake(
        "echo '#!/bin/sh' > u; chmod +x u; qfsbackup run $QMP --mountpoint $MNT -- ./u", 0, "took a snapshot", lines=ANY
    ),
    # how run ends: what was read, committed, and what comes next (each target is new, so its bitmaps go again)
    mistake(
        f"{RUN} -- true; c=$?; {FORGET}; exit $c",
        0,
        "read nothing of vda, vdb: does it back up what you mean?",
        "vda: 4 MiB of 4 MiB dirty (new), 0 B read",
        "committed to target t\n",
        "the next backup of vda is incremental, unless QEMU is restarted before it (a raw image holds none)",
        "the next backup of vdb is incremental\n",
        lines=ANY,
    ),
    mistake(
        f"{RUN} -- sh -c 'cat images/vda.raw; exit 7' > /dev/null",
        7,
        "vda: 4 MiB of 4 MiB dirty (new), 4 MiB read",
        "vdb: 4 MiB of 4 MiB dirty (new), 0 B read",
        "the command ended with status 7\n",
        "not committed to target t",
        lines=ANY,
    ),
    mistake(
        f"{RUN} -- sh -c 'kill $$'", 143, "the command ended with status 143 (SIGTERM)", "not committed", lines=ANY
    ),
    mistake("qfsbackup run $QMP --mountpoint $MNT -- true", 0, "there is no target=, so the next backup", lines=ANY),
    # a loop device on an image
    mistake(
        f"qfsbackup mount $QMP $MNT; L=$(losetup -r -f --show $MNT/images/vda.raw); {UMOUNT}; c=$?;"
        f" losetup -d $L; {UMOUNT}; exit $c",
        32,
        "is busy: /dev/loop",
        "losetup -d /dev/loop",
    ),
]

AT_WORK = ("is being backed up: `qfsbackup run` is at work (process ", "Wait for its end")

MOUNTED = [
    *(
        mistake(line, code, "is already mounted at", "/mnt by process ", "Unmount it first: qfsbackup umount")
        for line, code in (
            ("mkdir other; qfsbackup mount $QMP other", 32),
            ("qfsbackup mount $QMP $MNT", 32),
            ("ln -s $QMP link; qfsbackup cleanup link", 32),
            ("qfsbackup run $QMP -- true", 125),
            ("qfsbackup checkpoints $QMP", 32),
        )
    ),
    mistake("qfsbackup commit $MNT", 1, "mounted without a target"),
    # who is not root
    mistake(
        f"{USER} qfsbackup status | grep -q 'unknown$' && {USER} qfsbackup status | grep -q 'only root'", 0, lines=0
    ),
    mistake(f"{USER} qfsbackup status | grep -q cleanup", 1, lines=0),
    mistake(f"{USER} qfsbackup umount $MNT", 1, "is not yours", "takes root"),
]

ELSEWHERE = [
    mistake("qfsbackup status | grep -A 1 $MNT | grep -q 'in another mount namespace, that of process '", 0, lines=0),
    mistake('qfsbackup status --json | grep -q \'"state": "ready"\'', 0, lines=0),
    mistake("qfsbackup umount $MNT", 2, "in the mount namespace of process ", "nsenter --target"),
    mistake("qfsbackup mount $QMP $MNT", 32, "in another mount namespace", "nsenter --target"),
    mistake("qfsbackup cleanup $QMP", 32, "in another mount namespace", "nsenter --target"),
]

AT_WORK_ON_IT = [
    mistake("qfsbackup run $QMP --mountpoint $MNT -- true", 125, *AT_WORK),
    mistake("qfsbackup run $QMP -- true", 125, *AT_WORK),
    mistake("mkdir other; qfsbackup mount $QMP other", 32, *AT_WORK),
    mistake("qfsbackup cleanup $QMP", 32, *AT_WORK),
    mistake("qfsbackup checkpoints $QMP", 32, *AT_WORK),
]

OTHERS = [
    mistake("qfsbackup mount $QMP $MNT", 32, "(process ", ") holds the QMP socket", "one more QMP socket"),
    mistake("qfsbackup run $QMP -- true", 125, ") holds the QMP socket", "one more QMP socket"),
    mistake("qfsbackup cleanup $QMP", 32, ") holds the QMP socket", "one more QMP socket"),
]

TABLE: list[tuple[Situation, list[Mistake]]] = [
    (no_vm, NO_VM),
    (a_vm, VM),
    (a_mounted_vm, MOUNTED),
    (a_vm_mounted_elsewhere, ELSEWHERE),
    (a_backup_at_work, AT_WORK_ON_IT),
    (a_vm_of_others, OTHERS),
]


@pytest.mark.one_qemu
@pytest.mark.parametrize(("situation", "mistakes"), TABLE, ids=[situation.__name__ for situation, _ in TABLE])
async def test_a_mistake_is_told_in_two_lines_and_leaves_nothing(
    qemu: Qemu, tmp_path: Path, situation: Situation, mistakes: list[Mistake]
) -> None:
    async with situation(qemu, tmp_path) as place:
        wrong = [found for one in mistakes if (found := await one.wrong(place))]
    assert not wrong, "\n".join(wrong)
