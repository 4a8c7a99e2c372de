# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the supervisor does where the worker left something: fresh processes undo it, again and again.

Tried as long as the VM is there: its QEMU may hang and come back, or somebody's job may use our filter; both would else
have it for ever. SIGTERM ends the waiting.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

from qfsbackup.contracts import Source
from qfsbackup.errors import UserError
from qfsbackup.mount.notify import more_time
from qfsbackup.mount.runtime import frozen_by_the_dead, left_note
from qfsbackup.sources import find

log = logging.getLogger(__name__)

DEADLINE = 30.0  # seconds for one attempt
PAUSE = 5.0  # seconds between the first two; each pause is twice as long as the one before
LONGEST_PAUSE = 60.0  # seconds
MARGIN = 30.0  # seconds for a machine under load


def rescue(source: Source, option_texts: Sequence[str]) -> None:
    """Undo what is in the VM and take the dead mount away. `option_texts` are the arguments of -o that it had."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    for _, name, agent in frozen_by_the_dead():
        with suppress(OSError, UserError):
            find(name).thaw_unheard(agent)  # nothing comes before it; cleanup looks whether it worked
    note, told, pause = left_note(os.getpid()), "", PAUSE
    try:
        while left := _undo(source.name, option_texts):
            if not source.is_there():
                log.warning("QEMU is gone, and with it what was to be undone")
                return
            if left != told:
                log.error("%s; trying again until it is gone", left)
                with suppress(OSError):
                    note.write_text(left)
            told = left
            more_time(pause + DEADLINE + MARGIN)
            if signal.sigtimedwait({signal.SIGTERM}, pause):
                log.error("SIGTERM: giving up; then: qfsbackup cleanup %s", source.name)
                return
            pause = min(2 * pause, LONGEST_PAUSE)
        log.warning("QEMU is as it was")
    finally:
        with suppress(OSError):
            note.unlink()


def _undo(source: str, option_texts: Sequence[str]) -> str:
    """What is left; empty: nothing. Where we are killed meanwhile, what has begun goes on to its end."""
    options = [word for text in option_texts for word in ("-o", text)]
    command = [sys.executable, "-m", "qfsbackup", "cleanup", source, *options]
    try:
        done = subprocess.run(command, timeout=DEADLINE, check=False, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return f"QEMU does not answer within {DEADLINE:.0f} s"
    for line in done.stdout.splitlines():
        log.warning("%s", line)
    *_, what, _hint = ["", f"qfsbackup cleanup ended with status {done.returncode}", "", *done.stderr.splitlines()]
    return what if done.returncode else ""
