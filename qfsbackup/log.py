# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where log lines go: the terminal while a command runs, journald or syslog once it is in the background.

Names come from NBD servers and from QEMU, and may hold anything. On its way to a log or a terminal every character that
is not printable becomes an escape: no name can end a line, or tell a terminal what to do.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
from pathlib import Path

from qfsbackup.errors import UserError

JOURNAL_LEVELS = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
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


def _use(handler: logging.Handler, level: int) -> None:
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("qfsbackup").setLevel(level)


def _is_journal() -> bool:
    """systemd.exec(5): JOURNAL_STREAM names device and inode of the stream it connected."""
    stream = os.environ.get("JOURNAL_STREAM")
    status = os.fstat(sys.stderr.fileno())
    return stream == f"{status.st_dev}:{status.st_ino}"
