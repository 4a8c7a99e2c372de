# SPDX-License-Identifier: LGPL-2.1-or-later
"""`qfsbackup status`: the mounts of ours, how far they were read and how full their fleecing files are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qfsbackup.log import printable
from qfsbackup.mounts import Mount, find_mount, mounts_elsewhere, our_mounts
from qfsbackup.sizes import human
from qfsbackup.status import FORMAT


def collect(directory: Path | None) -> list[dict[str, Any]]:
    """The status of the mount at `directory`, or of all, those in other mount namespaces too.

    Where the mount itself does not tell it there is what the kernel knows of it: `state` is `dead`, or `unknown` for
    who may not look.
    """
    mounts = [*our_mounts(), *mounts_elsewhere()] if directory is None else [find_mount(directory)]
    return [{**_status(mount), **_place(mount)} for mount in mounts]


def _status(mount: Mount) -> dict[str, Any]:
    try:
        status = mount.status()
    except PermissionError:
        return _from_outside(mount, "unknown", "only root, or who mounted it, may look into it")
    except OSError as error:
        return _from_outside(mount, "dead", error.strerror or str(error))
    if status.get("format") != FORMAT:
        return _from_outside(mount, "unknown", "another version of qfsbackup mounted it")
    return status


def _from_outside(mount: Mount, state: str, reason: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "source": mount.source,
        "mountpoint": str(mount.mountpoint),
        "state": state,
        "broken": reason if state == "dead" else None,
        "reason": reason,
    }


def _place(mount: Mount) -> dict[str, Any]:
    return {"namespace_of": mount.process}


def as_json(statuses: list[dict[str, Any]]) -> str:
    """An array, one object a mount."""
    return json.dumps(statuses, indent=2)


def as_text(statuses: list[dict[str, Any]]) -> str:
    """A few lines a mount, for a person."""
    return "\n\n".join(_mount_text(status) for status in statuses) or "no snapshot is mounted"


def _mount_text(status: dict[str, Any]) -> str:
    lines = ["  ".join(printable(status[key]) for key in ("mountpoint", "source", "state"))]
    if status["namespace_of"] is not None:
        lines.append(f"  in another mount namespace, that of process {status['namespace_of']}")
    if status["state"] == "unknown":
        return "\n".join([*lines, f"  {status['reason']}"])
    if status["broken"]:
        lines.append(f"  broken: {printable(status['broken'])}")
    if status["state"] == "dead":
        lines.append(f"  put its VM back as it was: qfsbackup cleanup {printable(status['source'])}")
        return "\n".join(lines)
    fleecing = status["fleecing"]
    limit = f", limit {human(fleecing['limit'])}" if fleecing["limit"] else ""
    lines.append(f"  instant {status['instant']}, paused {status['pause_ms']:.1f} ms, frozen: {_yes(status['frozen'])}")
    lines.append(f"  fleecing {human(fleecing['used'])} used, {human(fleecing['free'])} free{limit}")
    lines += [_disk_text(printable(name), disk) for name, disk in status["disks"].items()]
    return "\n".join(lines)


def _disk_text(name: str, disk: dict[str, Any]) -> str:
    unread = disk.get("discarded_unread", 0)
    return (
        f"  {name}: {human(disk['size'])}, data {human(disk['data'])}, dirty {human(disk['dirty'])}"
        f" ({disk['bitmap']}); read {human(disk['read_bytes'])}, over NBD {human(disk['nbd_bytes'])},"
        f" punched {human(disk['punched'])}, errors {disk['read_errors']}"
        + (f"; {human(unread)} were discarded before anybody read them" if unread else "")
    )


def _yes(value: object) -> str:
    return "yes" if value else "no"
