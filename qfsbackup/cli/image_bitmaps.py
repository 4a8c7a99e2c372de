# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `qfsbackup checkpoints` does with an image whose VM is off: our bitmaps are inside, and qemu-img takes them off.

QEMU's image lock refuses it while a VM has the image open.
"""

from __future__ import annotations

import json
import stat
import subprocess
from pathlib import Path

from qfsbackup.errors import EXIT_SYSTEM, EXIT_USAGE, UserError


def is_image(source: str) -> bool:
    """Is this a file or a block device, and so no VM's socket."""
    try:
        mode = Path(source).stat().st_mode
    except OSError:
        return False
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def list_bitmaps(image: str) -> list[str]:
    """A line for each of our bitmaps in the image. Raises UserError."""
    found = [f"{target}  {generation}  {name}" for name, target, generation in _ours(image)]
    return found or [f"no target has a bitmap in {image}"]


def remove_bitmaps(image: str, target: str) -> list[str]:
    """Take all bitmaps of the target off the image. What was removed, a line each. Raises UserError."""
    names = [name for name, of, _ in _ours(image) if of == target]
    if not names:
        targets = ", ".join(sorted({of for _, of, _ in _ours(image)})) or "none"
        raise UserError(f"no bitmap of target {target} is in {image}", f"Targets: {targets}.", EXIT_USAGE)
    for name in names:
        _qemu_img(image, "bitmap", "-f", "qcow2", "--remove", image, name)
    return [f"removed the bitmap {name} of {image}" for name in names]


def _ours(image: str) -> list[tuple[str, str, str]]:
    """Name, target and generation of each bitmap of ours."""
    from qfsbackup.vm.bitmaps.checkpoint import NAME  # needs all the heavy modules

    facts = json.loads(_qemu_img(image, "info", "-f", "qcow2", "--output=json", image))
    bitmaps = facts["format-specific"]["data"].get("bitmaps", ())
    matches = [NAME.fullmatch(bitmap["name"]) for bitmap in bitmaps]
    return [(match[0], match["target"], match["generation"]) for match in matches if match]


def _qemu_img(image: str, *words: str) -> str:
    try:
        done = subprocess.run(["qemu-img", *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError("qemu-img is not installed", "It comes with QEMU (Debian: qemu-utils).", EXIT_SYSTEM) from None
    if done.returncode == 0:
        return done.stdout
    said = " ".join(done.stderr.split()).removeprefix("qemu-img: ")
    if " lock" in said:
        raise UserError(f"{image} is in use: {said}", "While its VM runs, name its QMP socket instead.", EXIT_SYSTEM)
    raise UserError(
        f"{image} cannot be looked into: {said}",
        "Name a VM's QMP socket, or the qcow2 image of a VM that is off: no other format holds bitmaps.",
        EXIT_USAGE,
    )
