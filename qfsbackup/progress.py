# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `run` shows while its command reads, and `restore` while it writes: a bar on a terminal, a line now and then
elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from qfsbackup.sizes import human

log = logging.getLogger(__name__)

LINE_EVERY = 60.0  # seconds

Show = Callable[[dict[str, Any]], None]


@contextmanager
def progress(status: dict[str, Any]) -> Iterator[Show]:
    """Call what it yields with each new status, as often as you like; `status` is the first one."""
    if sys.stderr.isatty():
        with _bar(status) as show:
            yield show
    else:
        yield _lines()


def read_bytes(status: dict[str, Any]) -> int:
    """What readers got so far, over all disks."""
    return sum(disk["read_bytes"] for disk in status["disks"].values())


@contextmanager
def _bar(status: dict[str, Any]) -> Iterator[Show]:
    total = sum(disk["size"] for disk in status["disks"].values())
    with _tqdm("read", total, "{rate_fmt}{postfix}") as bar:

        def show(now: dict[str, Any]) -> None:
            bar.n = read_bytes(now)
            bar.set_postfix_str(f"fleecing {human(now['fleecing']['used'])}")

        yield show


def _tqdm(what: str, total: int, tail: str) -> Any:
    """tqdm asks the terminal nothing: the answers would come through the input, which is the command's."""
    from tqdm import tqdm  # only terminals need it

    form = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}B of {total_fmt}B, " + tail
    scale = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
    known = os.get_terminal_size(sys.stderr.fileno()).columns > 0  # `docker run -t` and expect leave it at 0
    shape = {"dynamic_ncols": True} if known else {"ncols": 80, "nrows": 24}
    return tqdm(desc=what, total=total, bar_format=form, leave=False, file=sys.stderr, **scale, **shape)


def _lines() -> Show:
    last_time, last_bytes = time.monotonic(), 0

    def show(now: dict[str, Any]) -> None:
        nonlocal last_time, last_bytes
        elapsed = time.monotonic() - last_time
        if elapsed < LINE_EVERY:
            return
        done = read_bytes(now)
        log.info(
            "read %s, %s/s, fleecing %s",
            human(done), human(int((done - last_bytes) / elapsed)), human(now["fleecing"]["used"]),
        )  # fmt: skip
        last_time, last_bytes = time.monotonic(), done

    return show


@contextmanager
def bytes_done(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Call what it yields with how many of the `total` bytes are done, as often as you like."""
    if not sys.stderr.isatty():
        yield _byte_lines(what, total)
        return
    with _tqdm(what, total, "{rate_fmt}, {remaining} left") as bar:
        yield lambda done: bar.update(done - bar.n)
        bar.refresh()  # the last update may have been too early for another look


def _byte_lines(what: str, total: int) -> Callable[[int], None]:
    last = time.monotonic()

    def show(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_EVERY:
            last = time.monotonic()
            log.info("%s %s of %s", what, human(done), human(total))

    return show
