# SPDX-License-Identifier: LGPL-2.1-or-later
"""`qfsbackup checkpoints`: what each target has committed of a VM, and how much has changed since; and an end of it."""

from __future__ import annotations

from datetime import UTC, datetime

from qfsbackup.cli.image_bitmaps import is_image, list_bitmaps, remove_bitmaps
from qfsbackup.facts import Committed
from qfsbackup.options import parse_options
from qfsbackup.sizes import human

SHIFTS = "; the name is the drive's place, and may shift to another disk"


def list_checkpoints(source: str, option_texts: list[str]) -> list[str]:
    """A line for each target and disk; of the options only `state=` and `vm=` matter. Raises UserError."""
    from qfsbackup.cli.upkeep import committed  # needs all the heavy modules

    options = parse_options(option_texts)
    if is_image(source):
        return list_bitmaps(source)
    found, others = committed(source, options)
    return [_line(one) for one in found] + others or ["no target has committed a backup of this VM"]


def delete_checkpoint(source: str, option_texts: list[str], target: str, *, others: bool) -> list[str]:
    """Forget a target: its next backup is a full one. What was removed, a line each. Raises UserError.

    `others`: also the target's bitmaps that another store or another VM made.
    """
    from qfsbackup.cli.upkeep import forget  # needs all the heavy modules

    options = parse_options(option_texts)
    return remove_bitmaps(source, target) if is_image(source) else forget(source, options, target, others=others)


def _line(one: Committed) -> str:
    when = datetime.fromtimestamp(one.instant / 10**9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    dirty = f"{human(one.dirty)} dirty now" if one.dirty is not None else f"next backup is full: {one.reason}"
    shifts = SHIFTS if one.shifting else ""
    return f"{one.target}  {one.disk}  {one.generation}  {when}  {human(one.size)}, {dirty}{shifts}"
