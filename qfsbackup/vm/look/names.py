# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a disk is called: the same after a restart of the VM, and unlike every other disk's name.

In order of preference: the name that whoever manages the VM has for it, the qdev id, the block device name, the node
name that a person gave, the place in the machine.
Names that QEMU generates (`#block123`) are never used.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

PERIPHERAL = "/machine/peripheral/"  # where QEMU keeps the devices that a person gave an id (QOM)
# What QEMU calls a `-drive` without id=: interface, bus and number (drive_new in QEMU's blockdev.c).
AUTOMATIC = re.compile(r"(?:ide|scsi)\d+-(?:hd|cd)\d+|(?:virtio|pflash|sd|mtd|floppy|xen|none)\d+")


@dataclass(frozen=True, slots=True)
class Place:
    """All that could name a disk."""

    qdev: str  # QOM path of the device, or its id
    device: str  # name of the block device (`-drive id=`), empty where it has none
    node: str  # name of the root node, empty where there is no medium
    given: str = ""  # what whoever manages the VM calls it


def qdev_id(qdev: str) -> str:
    """What a person, or a manager, called the device; empty where nobody did."""
    path = qom_path(qdev)
    return path.removeprefix(PERIPHERAL).split("/")[0] if path.startswith(PERIPHERAL) else ""


def qom_path(qdev: str) -> str:
    """The absolute path of what `query-block` calls qdev; an id alone can be ambiguous (an NVMe disk and its bus)."""
    return qdev if qdev.startswith("/") else PERIPHERAL + qdev


def disk_names(places: Sequence[Place]) -> list[str]:
    """The names of all disks of a VM, in the order given.

    A disk takes its best candidate that nobody has a better or equal right to, so the order does not matter and a new
    disk renames another one only by claiming its name with an id.
    """
    candidates = [_candidates(place) for place in places]
    names: list[str | None] = [None] * len(places)
    taken: set[str] = set()
    for rank in range(3):
        wanted = {i: candidates[i][rank] for i, name in enumerate(names) if name is None and candidates[i][rank]}
        rivals = Counter(wanted.values())
        for i, name in wanted.items():
            if rivals[name] == 1 and name not in taken:
                names[i] = name
        taken |= rivals.keys()
    return [name or _position(place) for name, place in zip(names, places, strict=True)]


def shifts(name: str) -> bool:
    """May another disk get this name when the VM's command line changes: is it QEMU's own, or a place?"""
    return "/" in name or AUTOMATIC.fullmatch(name) is not None


def _candidates(place: Place) -> tuple[str, str, str]:
    return place.given or qdev_id(place.qdev), place.device, "" if place.node.startswith("#") else place.node


def _position(place: Place) -> str:
    return qom_path(place.qdev).removeprefix("/machine/")
