# SPDX-License-Identifier: LGPL-2.1-or-later
"""README.md's blocks of code are run as they stand there, in their order, with a booted guest and its agent.

What a block is, the word behind its three backticks says. Not run: `console` (installs things on this machine), `qemu`
(pieces of a command line), `text`, `borg2` (tests/incremental/test_borg_map.py has it) and `libvirt` (tests/libvirt).
"""

import configparser
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.disk import MIB, Disk
from tests.harness.mount import PROGRAM, ROOT, command
from tests.harness.qemu import Qemu
from tests.harness.vm import running_vm

README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = {"console", "qemu", "text", "borg2", "libvirt"}
UNITS = {"restic": "qfsbackup-restic@.service", "look": "qfsbackup@.service"}


def blocks() -> list[tuple[str, str]]:
    return [(kind, text) for kind, text in BLOCK.findall(README)]


def sh(text: str) -> str:
    """As a person types it. What is restored must be what is under the chunks."""
    if "qfsbackup restore" in text:
        chunks, image = "/srv/restored/chunks/vda/*/*", "/var/lib/vm/web1-vda.qcow2"
        text += f"qemu-img convert -O raw {image} /srv/vda.raw\ncat {chunks} | cmp - /srv/vda.raw\n"
    if "restic mount" in text:  # which takes a moment
        text = text.replace("\n", "\nuntil [ -d /mnt/restic/snapshots/latest ]; do sleep 0.1; done\n", 1)
        text += "grep -x text /mnt/disk/file\numount /mnt/disk\n"
    if "qemu-img create" in text:  # the last that needs the mounts
        text += "qemu-img compare -f raw -F qcow2 /mnt/old/images/vda.raw /var/lib/vm/web1-again.qcow2\n"
        text += "qfsbackup umount /mnt/old\numount /mnt/restic\n"
    return text


def fstab(text: str) -> str:
    """By the mountpoint alone, as its table has it."""
    place = text.split()[1]
    return f"cat > /etc/fstab << 'END'\n{text}END\nmount {place}\nls {place}/images\nqfsbackup umount {place}\n"


def ini(text: str) -> str:
    """What the unit starts, with the variables of its file."""
    looks = "DIRECTORY=" in text
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # the documented way to keep the case of keys
    parser.read(ROOT / "systemd" / UNITS["look" if looks else "restic"])
    service = parser["Service"]
    start = service["ExecStart"].replace("%i", "web1").replace("/usr/local/bin/", "").replace(" --foreground", "")
    end = "qfsbackup umount ${DIRECTORY}\n" if looks else ""
    return f"set -a\n{text}set +a\nunset RESTIC_PASSWORD\n{start}\n{end}"


RUN: dict[str, Callable[[str], str]] = {"sh": sh, "fstab": fstab, "ini": ini}


def test_every_block_says_what_it_is() -> None:
    assert README.count("\n```") == 2 * len(blocks())
    assert {kind for kind, _ in blocks()} == {*RUN, *NOT_RUN}


@pytest.mark.one_qemu
async def test_the_blocks_of_the_readme_run_as_they_stand_there(qemu: Qemu, tmp_path: Path) -> None:
    script = ["set -eu"]
    for number, (kind, text) in enumerate(blocks()):
        if kind in RUN:
            body = tmp_path / f"block{number}.sh"
            body.write_text(RUN[kind](text))
            script += [f"echo '== {kind}:' {shlex.quote(text.splitlines()[0])}", f"sh -eux {body}"]
    disks = [Disk("vda", tmp_path / "vda.raw", 16 * MIB), Disk("vdb", tmp_path / "vdb.qcow2", 16 * MIB, format="qcow2")]
    async with running_vm(qemu, tmp_path, disks, guest=True, agent=True) as vm:
        await vm.shell.run("mkfs.ext4 -q /dev/vda && mkdir -p /mnt0 && mount /dev/vda /mnt0 && echo text > /mnt0/file")
        namespace: list[str | Path] = ["unshare", "--mount", "--propagation", "private", ROOT / "tests/readme_setting"]
        environment = {"PATH": f"{PROGRAM.parent}:/usr/sbin:/usr/bin:/sbin:/bin"}
        words = [*namespace, tmp_path, PROGRAM.parent, "sh", "-c", "\n".join(script)]
        done = await command(*words, environment=environment, timeout=110)
    assert done.code == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.count("\n== ") + 1 == sum(kind in RUN for kind, _ in blocks())
    for target in ("nas", "usb", "box", "restic"):
        assert f"committed to target {target}\n" in done.stderr
    assert "file systems frozen" in done.stderr
