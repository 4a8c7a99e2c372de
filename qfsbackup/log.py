# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where log lines go: the terminal while a command runs, journald or syslog once it is in the background.

Names come from NBD servers and from QEMU, and may hold anything. On its way to a log or a terminal every character that
is not printable becomes an escape: no name can end a line, or tell a terminal what to do.
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from qfsbackup.errors import UserError

JOURNAL_LEVELS = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
MOST_RECORDS = 1000  # that wait to be written
FLUSH_TIMEOUT = 2.0  # seconds
SYSLOG_SOCKET = "/dev/log"


def printable(text: str) -> str:
    """`text` in one line, without control characters, or what else a terminal does not just show."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def say(error: UserError) -> None:
    """The two lines for the person, on standard error."""
    print(f"{printable(error.what)}\n{printable(error.hint)}", file=sys.stderr)  # noqa: T201  # this is where they go


class Formatter(logging.Formatter):
    """A message is one line; a traceback stands below it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        record.message = printable(record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        first, *trace = super().format(record).split("\n")
        return "\n".join([first, *map(printable, trace)])


class JournalFormatter(Formatter):
    """Puts `<N>` before each line, which systemd reads as its level (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        level = JOURNAL_LEVELS.get(record.levelno, 6)
        return "\n".join(f"<{level}>{line}" for line in super().format(record).split("\n"))


def to_stderr(level: int) -> None:
    """Log to standard error, for a person or, where systemd connected it, for the journal."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JournalFormatter("%(message)s") if _is_journal() else Formatter("%(message)s"))
    _use(handler, level)


def to_syslog(level: int) -> None:
    """Log to the system's log and to nothing where there is none: our standard error is gone by then."""
    handler: logging.Handler = logging.NullHandler()
    if Path(SYSLOG_SOCKET).exists():
        handler = logging.handlers.SysLogHandler(SYSLOG_SOCKET, logging.handlers.SysLogHandler.LOG_DAEMON)
        handler.setFormatter(Formatter("qfsbackup[%(process)d]: %(message)s"))
    _use(handler, level)


def only_warnings() -> None:
    """Say from now on only what goes wrong; with -v everything, as before."""
    logger = logging.getLogger("qfsbackup")
    if logger.level == logging.INFO:
        logger.setLevel(logging.WARNING)


class _Thread(logging.Handler):
    """Hands records to a thread, which hands them to `target`. Nobody waits for it: what is too much is lost."""

    def __init__(self, target: logging.Handler) -> None:
        super().__init__()
        self.target = target
        self._todo: queue.Queue[Callable[[], object]] = queue.Queue(MOST_RECORDS)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._is_over = False
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(queue.Full):
            self._todo.put_nowait(lambda: self.target.handle(record))

    def _run(self) -> None:
        while not self._is_over:
            self._todo.get()()

    def turn_to(self, target: logging.Handler) -> None:
        """From here on to another one; what came before goes where it should, unless that takes too long."""
        done = threading.Event()
        with contextlib.suppress(queue.Full):
            self._todo.put(done.set, timeout=FLUSH_TIMEOUT)
            done.wait(FLUSH_TIMEOUT)
        self.target = target

    def end(self) -> bool:
        """Write what there is. False where that takes too long."""
        with contextlib.suppress(queue.Full):
            self._todo.put(self._stop, timeout=FLUSH_TIMEOUT)
        self._thread.join(FLUSH_TIMEOUT)
        return not self._thread.is_alive()

    def _stop(self) -> None:
        self._is_over = True


@contextlib.contextmanager
def in_thread() -> Iterator[None]:
    """For as long as the block lasts, logging waits for no terminal, pipe or journal, whoever holds that up."""
    root = logging.getLogger()
    targets = root.handlers[:] or [logging.NullHandler()]
    thread = _Thread(targets[0])
    root.handlers = [thread]
    try:
        yield
    finally:
        root.handlers = [thread.target if thread.end() else logging.NullHandler()]


def _use(handler: logging.Handler, level: int) -> None:
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old, _Thread):
            old.turn_to(handler)
            break
        root.removeHandler(old)
        old.close()
    else:
        root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("qfsbackup").setLevel(level)


def _is_journal() -> bool:
    """systemd.exec(5): JOURNAL_STREAM names device and inode of the stream it connected."""
    stream = os.environ.get("JOURNAL_STREAM")
    status = os.fstat(sys.stderr.fileno())
    return stream == f"{status.st_dev}:{status.st_ino}"
