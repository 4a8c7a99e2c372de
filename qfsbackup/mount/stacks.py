# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where every task stands: what a maintainer wants to see of a mount that seems to hang (SIGUSR1)."""

from __future__ import annotations

import traceback
from collections.abc import Iterator

import trio


def all_stacks() -> str:
    """The tree of trio's tasks, each with the stack it waits in."""
    root = trio.lowlevel.current_root_task()
    return "\n".join(_lines(root, 0)) if root else "no tasks"


def _lines(task: trio.lowlevel.Task, depth: int) -> Iterator[str]:
    indent = "  " * depth
    yield f"{indent}task {task.name}"
    for frame in traceback.StackSummary.extract(task.iter_await_frames()):
        yield f"{indent}  {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield from _lines(child, depth + 1)
