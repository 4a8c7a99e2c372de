# SPDX-License-Identifier: LGPL-2.1-or-later
"""A QEMU VM for the length of a block.

    async with running_vm(qemu, tmp_path, [Disk("vda", tmp_path / "vda.raw")], guest=True) as vm:
        await vm.shell.run("mkfs.ext4 -q /dev/vda")

The VM has two QMP sockets: `vm.qmp` is left to the product, `vm.monitor` is the test's own session. Without a guest
the CPUs never start (`-S`), which takes no half second. Nothing of QEMU outlives the block, and an abort of QEMU
fails the test even if its body was content.
"""

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import trio

from .disk import Disk, arguments
from .monitor import Monitor, connected
from .process import Process, running
from .qemu import CACHE, Qemu
from .shell import Shell
from .sockets import listening

UUID = "7d9a5b1c-3c0e-4b7e-9a55-0f2f6f6f7a01"
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet panic=-1 mitigations=off nokaslr random.trust_cpu=on scsi_mod.scan=sync cryptomgr.notests"
)
BOOT_TIMEOUT = 60.0  # seconds; a boot takes 4 to 8 on an idle machine


@dataclass(frozen=True)
class Vm:
    """A running VM. `agent` is the guest agent's socket, None without an agent; `console` the guest's serial output."""

    qemu: Qemu
    disks: Sequence[Disk]
    qmp: Path
    agent: Path | None
    console: Path
    monitor: Monitor
    process: Process
    guest_shell: Shell | None

    @property
    def pid(self) -> int:
        """The process id of QEMU."""
        return self.process.pid

    @property
    def shell(self) -> Shell:
        """The root shell in the guest of a VM started with `guest=True`."""
        if self.guest_shell is None:
            raise LookupError("this VM has no guest: running_vm(..., guest=True)")
        return self.guest_shell


@contextlib.asynccontextmanager
async def running_vm(
    qemu: Qemu,
    directory: Path,
    disks: Sequence[Disk],
    *,
    guest: bool = False,
    agent: bool = False,
    machine: Literal["q35", "pc"] = "q35",
    extra_args: Sequence[str] = (),
    name: str = "vm",
) -> AsyncIterator[Vm]:
    """Start QEMU; with `guest`, wait until the guest has booted. `agent` alone gives a socket where nobody answers.

    Sockets and logs go to `directory`, whose path must be short (108 bytes a socket). Debian's cloud kernel has no
    AHCI driver: a guest sees IDE disks on machine `pc` only
    (and there its sda, sdb, .. are the IDE disks first, then those of virtio-scsi).
    """
    for disk in disks:
        await disk.create(qemu)
    parts = ["qmp", "monitor", *(["shell"] if guest else []), *(["agent"] if agent else [])]
    paths = {part: directory / f"{name}.{part}" for part in parts}
    console = directory / f"{name}.console"
    async with contextlib.AsyncExitStack() as stack:
        # QEMU gets sockets that listen already: a connection waits in them until QEMU is ready.
        with listening(paths.values()) as sockets:
            fds = {part: sock.fileno() for part, sock in zip(parts, sockets, strict=True)}
            command = [*_machine(qemu, machine, console, guest=guest), *_chardevs(fds), *arguments(disks, machine)]
            command += extra_args
            process = await stack.enter_async_context(
                running(command, directory / f"{name}-qemu.log", pass_fds=tuple(fds.values()))
            )
        monitor = await stack.enter_async_context(connected(paths["monitor"]))
        shell = None
        if guest:
            shell = Shell(await stack.enter_async_context(await trio.open_unix_socket(str(paths["shell"]))))
            await booted(shell, console)
        yield Vm(qemu, disks, paths["qmp"], paths.get("agent"), console, monitor, process, shell)


def _machine(qemu: Qemu, machine: str, console: Path, *, guest: bool) -> list[str | Path]:
    command: list[str | Path] = [qemu.system, "-nodefaults", "-no-user-config", "-display", "none"]
    command += ["-machine", f"{machine},accel=tcg", "-m", "192" if guest else "64", "-uuid", UUID]
    if not guest:
        return [*command, "-S"]
    command += ["-kernel", CACHE / "guest/vmlinuz", "-initrd", CACHE / "guest/initrd.img"]
    return [*command, "-append", KERNEL_ARGUMENTS, "-serial", f"file:{console}"]


def _chardevs(fds: dict[str, int]) -> list[str | Path]:
    ports = {"shell": "qfs.shell", "agent": "org.qemu.guest_agent.0"}
    result: list[str | Path] = ["-device", "virtio-serial-pci,id=serial0"] if ports.keys() & fds else []
    for part, fd in fds.items():
        result += ["-chardev", f"socket,id={part},fd={fd},server=on,wait=off"]
        if part in ports:
            result += ["-device", f"virtserialport,chardev={part},name={ports[part]}"]
        else:
            result += ["-mon", f"chardev={part},mode=control"]
    return result


async def booted(shell: Shell, console: Path) -> None:
    try:
        await shell.ready(BOOT_TIMEOUT)
    except (trio.TooSlowError, EOFError) as error:
        error.add_note(f"the guest's console:\n{console.read_text(errors='replace')}")  # noqa: ASYNC240 - a few KB
        raise
