# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checkpoints in QEMU: dirty bitmaps on the nodes that the guest writes to, and what each is worth as a base.

Bitmap `qfsbackup-<target>-<generation>` holds every write since that generation's instant, whatever dies meanwhile.
Beside it, `...-<generation>.low` tells what was cut off since (see low_water). Which generation counts is for the state
store to say; a bitmap of ours that it does not name is a leftover (see leftovers).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qfsbackup.facts import CLUSTER, Base, BitmapStatus
from qfsbackup.vm.bitmaps.low_water import low_water
from qfsbackup.vm.look.content import difference
from qfsbackup.vm.look.graph import Device, Node
from qfsbackup.vm.ours import PREFIX

NOTHING = "no backup of this disk was committed to the target yet"
GRANULARITY = CLUSTER  # bytes; finer ones cost memory and save nothing, for copy-before-write has this unit too
NAME = re.compile(rf"{PREFIX}(?P<target>.+)-(?P<generation>[0-9a-f]{{16}})(?:\.low)?")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Which generation a disk's backup starts, and from which."""

    target: str
    generation: str
    base: str | None  # the generation whose bitmap is copied into the map; None: everything is dirty
    status: BitmapStatus
    reason: str
    low_water: int = 0  # bytes: from here on the base says nothing, for the disk was cut off or has grown
    recorded: bool = True  # False: no bitmap could hold every write from now on
    content: str = ""  # what content_of says of the disk

    @property
    def new(self) -> str:
        """The name of the bitmap that records from now on."""
        return bitmap_name(self.target, self.generation)

    @property
    def old(self) -> str:
        """The name of the base's bitmap, where there is one."""
        return bitmap_name(self.target, self.base or "")


def bitmap_name(target: str, generation: str) -> str:
    """The name of the bitmap of a generation."""
    return f"{PREFIX}{target}-{generation}"


def low_name(name: str) -> str:
    """The name of what stands beside the bitmap `name`, for what was cut off from the disk."""
    return f"{name}.low"


def starting_point(
    disk: Device, target: str, generation: str, bases: Mapping[str, Base], content: str = "", shared: str = ""
) -> Checkpoint:
    """How the disk's backup starts from what the state store knows of the target: each disk's base, by its name.

    `content` is what content_of says of the disk now, `shared` why others may write to it.
    """
    base = bases.get(disk.name)
    why = shared or (problem(disk, target, base, content) if base else NOTHING)
    if base is not None and not why:
        low = low_water(find(disk.format, low_name(bitmap_name(target, base.generation))), base.size)
        return Checkpoint(target, generation, base.generation, "reuse", "", low or 0, content=content)
    moved = "" if shared else _moved(disk, target, bases)
    return Checkpoint(
        target, generation, None, "invalid" if base else "new", why + moved, recorded=not shared, content=content
    )


def problem(disk: Device, target: str, base: Base, content: str) -> str:
    """Why the disk's changes since the base are not known; empty where they are."""
    name = bitmap_name(target, base.generation)
    why = unusable(disk.format, name)
    if why:
        return f"the bitmap {name} {why}"
    bitmap = find(disk.format, name) or {}
    return difference(base.content, content, stored_in_image=bool(bitmap.get("persistent")))


def _moved(disk: Device, target: str, bases: Mapping[str, Base]) -> str:
    """What to add where the disk has the bitmap of another one: its image is now called otherwise."""
    others = [
        name
        for name, base in bases.items()
        if name != disk.name and find(disk.format, bitmap_name(target, base.generation))
    ]
    return f"; it carries the bitmap of the disk that was called {', '.join(others)}" if others else ""


def find(node: Node, name: str) -> Mapping[str, Any] | None:
    """What query-named-block-nodes says of the node's bitmap of that name."""
    return next((bitmap for bitmap in node.bitmaps if bitmap.get("name") == name), None)


def count(node: Node, name: str) -> int | None:
    """How many bytes the node's bitmap of that name calls dirty; None where there is no such bitmap."""
    bitmap = find(node, name)
    return None if bitmap is None else int(bitmap["count"])


def unusable(node: Node, name: str) -> str:
    """Why the node's bitmap of that name does not hold every change since its generation; empty where it does."""
    bitmap = find(node, name)
    if bitmap is None:
        return "is not there: QEMU was restarted or crashed, or the image was changed"
    if bitmap.get("inconsistent"):
        return "was not stored completely: QEMU crashed"
    if not bitmap.get("recording"):
        return "was disabled by somebody"
    if bitmap.get("busy"):  # it can then not even be copied (QEMU 7.2)
        return "is in use by another backup or export"
    if bitmap["granularity"] != GRANULARITY:
        return f"has granularity {bitmap['granularity']}, not {GRANULARITY}"
    if low_water(find(node, low_name(name)), 0) is None:
        return "has lost its companion, which tells of resizes"
    return ""
