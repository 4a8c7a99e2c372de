# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which disks of a VM go into the snapshot, and which VMs and disks are refused because it would hurt the guest."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from qfsbackup.errors import EXIT_USAGE, UserError
from qfsbackup.vm.look.graph import Device, Machine
from qfsbackup.vm.ours import PREFIX
from qfsbackup.vm.quirks import OLDEST, survives_iothread, text

UNUSABLE_STATES = frozenset(["colo", "finish-migrate", "inmigrate", "postmigrate", "restore-vm", "save-vm", "shutdown"])
MIGRATION_OVER = frozenset([None, "none", "completed", "failed", "cancelled"])


def choose(machine: Machine, wanted: Collection[str], excluded: Collection[str]) -> tuple[Device, ...]:
    """The disks named in `wanted` (none: all that are writable and have a medium), without those in `excluded`.

    Raises UserError for a name that the VM does not have, a wanted disk without a medium, and when none is left.
    """
    _known(machine, [*wanted, *excluded])
    if wanted:
        chosen = [disk for disk in machine.disks if disk.name in wanted and disk.name not in excluded]
    else:
        chosen = [disk for disk in machine.disks if disk.name not in excluded and not left_out(disk)]
    for disk in chosen:
        if not disk.nodes:
            raise UserError(f"disk {disk.name} has no medium", "Insert one, or leave the disk out.")
    if not chosen:
        raise UserError("the VM has no disk to snapshot", f"Its drives are: {_list(machine)}.")
    return tuple(chosen)


def left_out(disk: Device) -> str:
    """Why a disk is left out unless somebody names it; empty where it is not."""
    if not disk.nodes:
        return "no medium"
    if disk.cdrom:
        return "a CD-ROM"
    return "read-only" if disk.root.read_only else ""


def refuse_machine(machine: Machine) -> None:
    """Raise UserError where no snapshot can be taken of this VM at all, now or ever."""
    if machine.version < OLDEST:
        raise UserError(
            f"QEMU {text(machine.version)} is too old",
            "A guest is safe from backup errors since QEMU 7.1: use a newer one.",
        )
    if machine.status in UNUSABLE_STATES:
        raise UserError(f"the VM is in the state {machine.status}", "Try again when it runs or is paused.")
    if machine.migration not in MIGRATION_OVER:
        raise UserError(f"the VM is being migrated ({machine.migration})", "Try again when the migration is over.")
    foreign = [export["id"] for export in machine.exports if not export["id"].startswith(PREFIX)]
    if foreign:
        raise UserError(
            f"QEMU already exports disks for somebody else ({', '.join(foreign)})",
            "Another backup or a storage migration seems to be running: wait for its end.",
        )


def refuse_disks(machine: Machine, disks: Iterable[Device]) -> None:
    """Raise UserError where a snapshot of one of these disks would hurt the guest or somebody else's work."""
    for disk in disks:
        _refuse_second_device(machine, disk)
        if disk.iothread and not survives_iothread(machine.version):
            raise UserError(
                f"disk {disk.name} is in an iothread, which QEMU {text(machine.version)} does not survive",
                "Leave it out (exclude=), start the VM without iothread=, or use QEMU 8.2 or newer.",
            )
        if any(node.driver == "copy-before-write" for node in disk.nodes):
            raise UserError(
                f"another backup of disk {disk.name} is running", "Wait for its end, or leave the disk out."
            )
        # A mirror watches the guest's writes in a filter of its own, which our filter would take out of the guest's
        # way: the copy that the guest then goes on with lacks these writes (seen with QEMU 10.0).
        jobs = sorted({job for node in disk.nodes for job in node.jobs})
        if jobs:
            raise UserError(
                f"a block job of disk {disk.name} is running ({', '.join(jobs)}): a backup, mirror, commit or stream",
                "Wait for its end, or leave the disk out (exclude=).",
            )


def _refuse_second_device(machine: Machine, disk: Device) -> None:
    """QEMU gives one device after the other our filter, and none while another one still writes past it ("Permission
    conflict", 7.2 and 10.0); a backup job's filter takes all at once, but lets the guest see its errors before 10.1.
    """
    below = {node.name for node in disk.nodes}
    sharing = sorted(other.name for other in machine.disks if below & {node.name for node in other.nodes})
    if len(sharing) > 1 and not disk.root.read_only:
        raise UserError(
            f"{' and '.join(sharing)} are one disk behind {len(sharing)} devices (block node {disk.root.name}): QEMU"
            " cannot put a filter into the way of all of them at once",
            f"Leave the disk out: exclude={':'.join(sharing)}. It can be backed up while the VM has it only once.",
        )


def _known(machine: Machine, names: Iterable[str]) -> None:
    unknown = sorted(set(names) - {disk.name for disk in machine.disks})
    if unknown:
        raise UserError(
            f"the VM has no disk called {', '.join(unknown)}", f"It has: {_list(machine)}.", exit_code=EXIT_USAGE
        )


def _list(machine: Machine) -> str:
    reasons = [(disk.name, left_out(disk)) for disk in machine.disks]
    return ", ".join(f"{name} ({reason})" if reason else name for name, reason in reasons) or "none"
