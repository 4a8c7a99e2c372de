# SPDX-License-Identifier: LGPL-2.1-or-later
"""The signals that mean something to a mount: the supervisor hands them on, the worker acts on them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from qfsbackup.errors import Interrupted

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # it ends in order
TELLING = signal.SIGUSR1  # it logs where each of its tasks stands
HANDED_ON = (*ENDING, TELLING)


def acted_on() -> tuple[signal.Signals, ...]:
    """HANDED_ON, without SIGHUP where whoever started us had it ignored (nohup(1))."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in HANDED_ON if not (ignored and number == signal.SIGHUP))


@contextmanager
def ending_interrupts() -> Iterator[None]:
    """Every signal of ENDING is raised in the block, as SIGINT is everywhere: but those that are ignored."""

    def interrupt(number: int, _: object) -> NoReturn:
        raise Interrupted(signal.Signals(number))

    others = [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]
    for number in others:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in others:
            signal.signal(number, signal.SIG_DFL)
