# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where log lines go: the terminal while a command runs, journald or syslog once it is in the background."""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
from pathlib import Path

JOURNAL_LEVELS = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
SYSLOG_SOCKET = "/dev/log"


class JournalFormatter(logging.Formatter):
    """Puts `<N>` before each line, which systemd reads as its level (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        level = JOURNAL_LEVELS.get(record.levelno, 6)
        return "\n".join(f"<{level}>{line}" for line in super().format(record).splitlines())


def to_stderr(level: int) -> None:
    """Log to standard error, for a person or, where systemd connected it, for the journal."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JournalFormatter("%(message)s") if _is_journal() else logging.Formatter("%(message)s"))
    _use(handler, level)


def to_syslog(level: int) -> None:
    """Log to the system's log and to nothing where there is none: our standard error is gone by then."""
    handler: logging.Handler = logging.NullHandler()
    if Path(SYSLOG_SOCKET).exists():
        handler = logging.handlers.SysLogHandler(SYSLOG_SOCKET, logging.handlers.SysLogHandler.LOG_DAEMON)
        handler.setFormatter(logging.Formatter("qfsbackup[%(process)d]: %(message)s"))
    _use(handler, level)


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
