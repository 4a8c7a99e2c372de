# SPDX-License-Identifier: LGPL-2.1-or-later
"""The samples as a Markdown table, and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from .measure import Sample
from .rows import NBDCOPY, ROWS, Row, Samples
from .scale import GIB, MIB, Scale

HEADER = (
    "what",
    "who",
    "median",
    "lowest..highest",
    "qfsbackup is",
    "goal",
    "CPU s/GiB: own + QEMU + reader",
    "peak MiB",
)


def as_text(machine: Mapping[str, str], scale: Scale, samples: Samples) -> str:
    """The machine, what the disks are, and the table."""
    facts = "; ".join(f"{name}: {value}" for name, value in machine.items())
    disks = (
        f"A paused VM with a disk `full` of {_size(scale.full)} without zeros and a disk `sparse` of "
        f"{_size(scale.sparse)}, of which {_size(scale.data)} are data in pieces of {_size(scale.piece)}, "
        f"behind copy-before-write; rounds: {scale.rounds}, contenders in turn, "
        "the kernel's caches dropped before each run."
    )
    lines = [_line(HEADER), _line(["---"] * len(HEADER))]
    for name, row in ROWS.items():
        if name in samples.of:
            lines += [_line(cells) for cells in _cells(row, samples.of[name])]
    return "\n".join([facts, "", disks, "", *lines])


def _size(size: int) -> str:
    return f"{size / GIB:g} GiB" if size >= GIB else f"{size // MIB} MiB"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row, found: Mapping[str, Sequence[Sample]]) -> list[list[str]]:
    title = f"{row.title}, {row.unit}"
    ratios, goals = _ratios(row, found), _goals(row, found)
    cells = []
    for name, samples in found.items():
        values = [sample.value for sample in samples]
        spread = f"{min(values):.4g}..{max(values):.4g}"
        ratio = f"{ratios[name]:.2f} x" if name in ratios else ""
        goal = f">= {goals[name]:g} x" if name in goals else ""
        cells.append([title, name, f"{median(values):.4g}", spread, ratio, goal, _cpu(samples), _peak(samples)])
        title = ""
    return cells


def _ratios(row: Row, found: Mapping[str, Sequence[Sample]]) -> dict[str, float]:
    """How many times better ours is than each of the others; above 1 is better."""
    middle = {name: median(sample.value for sample in samples) for name, samples in found.items()}
    if row.ours not in middle:
        return {}
    ours = middle.pop(row.ours)
    return {name: ours / other if row.more_is_better else other / ours for name, other in middle.items()}


def _goals(row: Row, found: Mapping[str, Sequence[Sample]]) -> dict[str, float]:
    """The goal for each contender; of nbdcopy's settings only the best one has it."""
    copies = [name for name in found if name.startswith(NBDCOPY)]
    best = max(copies, key=lambda name: median(sample.value for sample in found[name]), default=None)
    names = {name for name in found if name not in copies or name == best}
    return {name: goal for name in names for begin, goal in row.goals.items() if name.startswith(begin)}


def _cpu(samples: Sequence[Sample]) -> str:
    shares = _cpu_per_gib(samples)
    return " + ".join(f"{share:.2f}" for share in shares.values()) if shares else ""


def _cpu_per_gib(samples: Sequence[Sample]) -> dict[str, float]:
    if not all(sample.size for sample in samples):
        return {}
    return {
        who: median(getattr(sample, who) / (sample.size / GIB) for sample in samples)
        for who in ("own", "qemu", "reader")
    }


def _peak(samples: Sequence[Sample]) -> str:
    peak = max(sample.peak for sample in samples)
    return f"{peak:.0f}" if peak else ""


def as_json(machine: Mapping[str, str], scale: Scale, samples: Samples) -> dict[str, Any]:
    """The same, with each sample; see measure.Sample for the units."""
    rows = {}
    for name, found in samples.of.items():
        row = ROWS[name]
        rows[name] = {
            "title": row.title,
            "unit": row.unit,
            "more_is_better": row.more_is_better,
            "ratios": _ratios(row, found),
            "goals": _goals(row, found),
            "cpu_seconds_per_gib": {who: _cpu_per_gib(of) for who, of in found.items()},
            "samples": {who: [asdict(sample) for sample in of] for who, of in found.items()},
        }
    return {"machine": dict(machine), "scale": asdict(scale), "rows": rows}
