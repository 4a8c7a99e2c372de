# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `run` does with signals: its command gets them, and we unmount in order whatever comes.

SIGINT and SIGQUIT reach the command from the terminal by themselves, SIGTERM and SIGHUP are sent on. exec gives the
command the default actions; what was ignored before us (nohup(1), a shell's `&`) stays ignored.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
SENT_ON = (signal.SIGTERM, signal.SIGHUP)


class Receiver(Protocol):
    """Who signals are sent on to."""

    def send_signal(self, number: int) -> None: ...


class RunSignals:
    """The handlers, for the length of `handled`. `interrupted`: did SIGINT come when the command had ended already."""

    def __init__(self) -> None:
        self.interrupted = False
        self._early: list[int] = []
        self._act: Callable[[int], None] = self._early.append

    @contextmanager
    def handled(self) -> Iterator[None]:
        """SIGINT may be blocked before; it is not after the first line here."""
        old = {
            number: signal.signal(number, lambda number, _: self._act(number))
            for number in (*FROM_TERMINAL, *SENT_ON)
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    @contextmanager
    def sent_to(self, command: Receiver) -> Iterator[None]:
        """The command runs; what came before it started is for it, too."""
        self._act = lambda number: None if number in FROM_TERMINAL else command.send_signal(number)
        for number in self._early:
            command.send_signal(number)
        try:
            yield
        finally:
            self._act = self._too_late

    def _too_late(self, number: int) -> None:
        self.interrupted |= number == signal.SIGINT
