# SPDX-License-Identifier: LGPL-2.1-or-later
"""A libvirt of the test's own, without systemd, and domains in it.

    async with libvirt(tmp_path) as host, host.domain(qemu, tmp_path, disks, guest=True) as domain:
        await domain.virsh("suspend")
        await domain.qmp("query-status")

libvirtd and its domains live in namespaces of their own: its folders (/etc/libvirt, /run, /var/...) are below the
test's, nothing of the machine's is seen or touched, and all its processes end with process 1 in there, whatever
happens. The tests' own eyes are virsh's. Disks are called by their target: `Disk("sda", interface="virtio-scsi")`.
"""

import contextlib
import json
import os
import signal
import socket
import struct
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from .disk import Disk
from .mount import Result, command, ending
from .process import running
from .qemu import CACHE, Qemu
from .shell import Shell
from .vm import KERNEL_ARGUMENTS, booted

KNOWN = CACHE / "libvirt"  # what libvirtd found out about each QEMU, which takes it more than a second
START_TIMEOUT = 20.0  # seconds
DRIVER = next(Path("/usr").glob("lib*/**/libvirt_driver_qemu.so"), Path())  # the others would look at the machine
# Process 1 reaps by ignoring its children's ends: libvirt waits 15 s for one that nobody reaps. The user is one that
# libvirt must know, though it runs nothing as him here.
INSIDE = """
set -e
mount --bind "$0/etc" /etc/libvirt
for file in passwd group; do
    { cat /etc/$file; echo libvirt-qemu:x:64055:64055::/:/usr/sbin/nologin; } > "$0/$file"
    mount --bind "$0/$file" /etc/$file
done
for place in run var/lib var/log; do mount --bind "$0/$place" /$place; done
mount --bind "$1" /var/cache
echo >&"$2"
exec env --ignore-signal=CHLD sleep infinity
"""
LIBVIRTD_CONF = """
unix_sock_dir = "{folder}"
log_outputs = "2:file:{folder}/libvirtd.log"
"""
# Root, for the tests' folders are root's; no cgroups and no log daemon, which systemd provides elsewhere.
QEMU_CONF = """
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
"""
DOMAIN = """
<domain type='qemu'>
  <name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>{memory}</memory><vcpu>1</vcpu><iothreads>1</iothreads>
  <os><type arch='x86_64' machine='pc'>hvm</type>{boot}</os><features><acpi/></features>
  <devices>
    <emulator>{emulator}</emulator>
    {disks}{devices}
    <controller type='scsi' model='virtio-scsi'/><memballoon model='none'/>
    <serial type='file'><source path='{folder}/{name}.console'/></serial>
    <channel type='unix'>
      <source mode='bind' path='{folder}/{name}.shell'/><target type='virtio' name='qfs.shell'/>
    </channel>
    <channel type='unix'>
      <source mode='bind' path='{folder}/{name}.agent'/><target type='virtio' name='org.qemu.guest_agent.0'/>
    </channel>
  </devices>
</domain>
"""
GUEST = CACHE / "guest"
BOOT = f"<kernel>{GUEST}/vmlinuz</kernel><initrd>{GUEST}/initrd.img</initrd><cmdline>{KERNEL_ARGUMENTS}</cmdline>"
DEVICES = {"vda": "virtio-disk0/virtio-backend", "vdb": "virtio-disk1/virtio-backend", "sda": "scsi0-0-0-0"}


@dataclass(frozen=True)
class Libvirt:
    """libvirtd at `uri`. `folder` holds what it calls /etc, /run and /var; `inside` is process 1 of its namespaces."""

    folder: Path
    inside: int

    @property
    def uri(self) -> str:
        """Where clients connect to."""
        return f"qemu+unix:///system?socket={self.folder}/libvirt-sock"

    async def start(self) -> None:
        """Start libvirtd; it listens when this returns."""
        drivers = {"LIBVIRT_DRIVER_DIR": str(self.folder / "drivers")}
        line = ["nsenter", f"--target={self.inside}", "--mount", "--pid", "--", "libvirtd", "--daemon"]
        result = await command(*line, "--config", self.folder / "libvirtd.conf", environment=drivers)
        assert result.code == 0, result

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End libvirtd with a signal; its domains live on."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(f"{self.folder}/libvirt-sock")
            pid, *_ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        async with ending(pid):
            os.kill(pid, number)

    async def virsh(self, *words: str | Path) -> str:
        """What `virsh WORDS` prints. Raises AssertionError where it fails."""
        result = await self.try_virsh(*words)
        assert result.code == 0, result
        return result.stdout.strip()

    async def try_virsh(self, *words: str | Path) -> Result:
        """Run `virsh WORDS`."""
        return await command("virsh", "-q", "-c", self.uri, *words)

    @contextlib.asynccontextmanager
    async def domain(
        self,
        qemu: Qemu,
        folder: Path,
        disks: Sequence[Disk],
        *,
        guest: bool = False,
        name: str = "dom",
        devices: str = "",
    ) -> AsyncIterator["Domain"]:
        """Define a domain and start it: with `guest` it has booted, else it is paused from its start on. `devices` is
        more XML."""
        for disk in disks:
            await disk.create(qemu)
        xml = DOMAIN.format(
            name=name,
            uuid=uuid.uuid4(),
            memory=192 if guest else 64,
            boot=BOOT if guest else "",
            emulator=qemu.system,
            folder=folder,
            disks="\n    ".join(map(_disk, disks)),
            devices=devices,
        )
        (folder / f"{name}.xml").write_text(xml)
        await self.virsh("define", folder / f"{name}.xml")
        domain = Domain(self, name, disks)
        await domain.virsh("start", *([] if guest else ["--paused"]))
        async with contextlib.AsyncExitStack() as stack:
            if guest:
                stream = await stack.enter_async_context(await trio.open_unix_socket(str(folder / f"{name}.shell")))
                domain = Domain(self, name, disks, Shell(stream))
                await booted(domain.shell, folder / f"{name}.console")
            yield domain


@dataclass(frozen=True)
class Domain:
    """A domain that runs, or is paused before its first instruction."""

    host: Libvirt
    name: str
    disks: Sequence[Disk]
    guest_shell: Shell | None = None

    @property
    def source(self) -> str:
        """What qfsbackup calls it."""
        return f"libvirt:{self.host.uri}/{self.name}"

    @property
    def shell(self) -> Shell:
        """The root shell in the guest of a domain started with `guest=True`."""
        if self.guest_shell is None:
            raise LookupError("this domain has no guest: domain(..., guest=True)")
        return self.guest_shell

    @property
    def pid(self) -> int:
        """QEMU's process id, as seen from here. Raises LookupError where it does not run."""
        namespace = os.stat(f"/proc/{self.host.inside}/ns/pid")  # noqa: PTH116 - no path
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                named = any(word.startswith(f"guest={self.name},".encode()) for word in words)
                if named and os.path.samestat((entry / "ns/pid").stat(), namespace):
                    return int(entry.name)
        raise LookupError(f"{self.name} does not run")

    async def virsh(self, verb: str, *words: str | Path) -> str:
        """What `virsh VERB NAME WORDS` prints. Raises AssertionError where it fails."""
        return await self.host.virsh(verb, self.name, *words)

    async def io(self, disk: str, command: str) -> None:
        """Let a disk do what its guest would: `io("vda", "write -P 1 0 64k")`; also in a paused domain."""
        device = {"vda": "virtio-disk0/virtio-backend", "vdb": "virtio-disk1/virtio-backend", "sda": "scsi0-0-0-0"}[
            disk
        ]
        line = f'qemu-io -d /machine/peripheral/{device} "{command}"'
        said = await self.qmp("human-monitor-command", {"command-line": line})
        assert "rror" not in said, said

    async def view(self) -> dict[str, Any]:
        """All that QEMU and libvirt say of the domain's disks, to be compared before and after."""
        nodes = await self.qmp("query-named-block-nodes", {"flat": True})
        devices = await self.qmp("query-block")
        return {
            "xml": await self.virsh("dumpxml"),
            "inactive": await self.virsh("dumpxml", "--inactive"),
            "disks": await self.virsh("domblklist"),
            "state": await self.virsh("domstate", "--reason"),
            "nodes": sorted((node["node-name"], node["drv"], str(node.get("dirty-bitmaps"))) for node in nodes),
            "devices": [(one["qdev"], one.get("inserted", {}).get("node-name")) for one in devices],
            "exports": await self.qmp("query-block-exports"),
            "jobs": await self.qmp("query-jobs"),
        }

    async def qmp(self, name: str, arguments: dict[str, Any] | None = None, /) -> Any:
        """What QEMU answers. Raises AssertionError where it refuses."""
        message = json.dumps({"execute": name, "arguments": arguments or {}})
        answer = json.loads(await self.virsh("qemu-monitor-command", message))
        assert "return" in answer, answer
        return answer["return"]


@contextlib.asynccontextmanager
async def libvirt(directory: Path) -> AsyncIterator[Libvirt]:
    """A libvirtd for the length of the block, in a new folder in `directory`."""
    folder = directory / "libvirt"
    KNOWN.mkdir(exist_ok=True)
    for place in ("etc", "run", "var/lib", "var/log"):
        (folder / place).mkdir(parents=True)
    (folder / "drivers").mkdir()
    (folder / f"drivers/{DRIVER.name}").symlink_to(DRIVER)
    (folder / "etc/qemu.conf").write_text(QEMU_CONF)
    (folder / "libvirtd.conf").write_text(LIBVIRTD_CONF.format(folder=folder))
    async with _namespaces(folder) as inside:
        host = Libvirt(folder, inside)
        await host.start()
        yield host


@contextlib.asynccontextmanager
async def _namespaces(folder: Path) -> AsyncIterator[int]:
    """Process 1 of new namespaces, as seen from here; with it everything in them ends."""
    told, tell = os.pipe()
    line: list[str | Path] = ["unshare", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child"]
    line += ["bash", "-c", INSIDE, folder, KNOWN, str(tell)]
    async with running(line, folder / "inside.log", pass_fds=[tell], expected=(0, 1, 137, 143)) as outside:
        os.close(tell)
        with contextlib.closing(os.fdopen(told)), trio.fail_after(START_TIMEOUT):
            await trio.lowlevel.wait_readable(told)
        outside.check()
        inside = int(Path(f"/proc/{outside.pid}/task/{outside.pid}/children").read_text())  # noqa: ASYNC240 - no disk
        async with ending(inside):
            try:
                yield inside
            finally:
                os.kill(inside, signal.SIGKILL)


def _disk(disk: Disk) -> str:
    bus = {"virtio-blk": "virtio", "virtio-scsi": "scsi", "ide": "ide"}[disk.interface]
    iothread = " iothread='1'" if disk.iothread else ""
    source = f"<source file='{disk.path}'/>" if disk.path else ""
    kind, more = ("cdrom", "<readonly/>") if disk.cdrom else ("disk", "<readonly/>" if disk.read_only else "")
    return (
        f"<disk type='file' device='{kind}'><driver name='qemu' type='{disk.format}' discard='unmap'{iothread}/>"
        f"{source}<target dev='{disk.id}' bus='{bus}'/>{more}</disk>"
    )
