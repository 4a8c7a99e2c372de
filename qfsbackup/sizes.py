# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sizes as people write and read them, in powers of 1024."""

from __future__ import annotations

import re

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def parse_size(text: str) -> int:
    """`text` in bytes; a suffix k, M, G or T (also KiB and so on) counts in powers of 1024. Raises ValueError."""
    match = re.fullmatch(r"(\d+)([kmgt]?)(i?b)?", text.strip().lower())
    if not match:
        raise ValueError("a size is a number, with k, M, G or T behind it for KiB, MiB, GiB, TiB")
    return int(match[1]) << 10 * " kmgt".index(match[2] or " ")


def human(size: int) -> str:
    """`size` bytes with a binary unit and three digits."""
    value, unit = float(size), ""
    for unit in UNITS:
        if value < 1000 or unit == UNITS[-1]:
            break
        value /= 1024
    return f"{value:.3g} {unit}"
