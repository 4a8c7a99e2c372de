# SPDX-License-Identifier: LGPL-2.1-or-later
"""`qfsbackup mount` and mount.qfsbackup: show a snapshot until it is unmounted."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qfsbackup.mount.notify import more_time
from qfsbackup.mount.runtime import LeftNote, frozen_by_the_dead
from qfsbackup.mount.supervisor import in_background, in_foreground
from qfsbackup.options import Options, parse_options
from qfsbackup.sources.fit import check_fit
from qfsbackup.vm.presence import listens
from qfsbackup.vm.thaw import thaw_unheard

log = logging.getLogger(__name__)

RESCUE_DEADLINE = 30.0  # seconds for one attempt
RESCUE_PAUSE = 5.0  # seconds between the first two; each pause is twice as long as the one before
LONGEST_PAUSE = 60.0  # seconds
MARGIN = 30.0  # seconds for a machine under load


@dataclass(frozen=True, slots=True)
class MountRequest:
    """A mount as it was asked for; `option_texts` are the arguments of -o."""

    source: str
    mountpoint: Path
    option_texts: tuple[str, ...]
    log_level: int

    def work(self, ready: Callable[[], None]) -> int:
        """The worker's part, after the fork: only here the heavy modules are imported."""
        from qfsbackup.mount.daemon import serve  # the supervisor must not have trio and FUSE in it

        return serve(self.source, self.mountpoint, self.options(), ready)

    def options(self) -> Options:
        """What it is asked to be. Raises UserError."""
        options = parse_options(list(self.option_texts))
        check_fit(options, self.source)
        return options

    def rescue(self) -> None:
        """The worker left something: fresh processes undo it in the VM and take the dead mount away.

        Tried again as long as QEMU lives: it may hang and come back, or somebody's job may use our filter; both would
        else have it for ever. SIGTERM ends the waiting.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        for frozen in frozen_by_the_dead():
            with suppress(OSError):
                thaw_unheard(Path(frozen.read_text()))  # nothing comes before it; cleanup looks whether it worked
        note, told, pause = LeftNote(os.getpid()), "", RESCUE_PAUSE
        try:
            while left := self._undo():
                if not listens(self.source):
                    log.warning("QEMU is gone, and with it what was to be undone")
                    return
                if left != told:
                    log.error("%s; trying again until it is gone", left)
                    note.write(left)
                told = left
                more_time(pause + RESCUE_DEADLINE + MARGIN)
                if signal.sigtimedwait({signal.SIGTERM}, pause):
                    log.error("SIGTERM: giving up; then: qfsbackup cleanup %s", self.source)
                    return
                pause = min(2 * pause, LONGEST_PAUSE)
            log.warning("QEMU is as it was")
        finally:
            note.remove()

    def _undo(self) -> str:
        """What is left; empty: nothing. Where we are killed meanwhile, what has begun goes on to its end."""
        options = [word for text in self.option_texts for word in ("-o", text)]
        command = [sys.executable, "-m", "qfsbackup", "cleanup", self.source, *options]
        try:
            done = subprocess.run(command, timeout=RESCUE_DEADLINE, check=False, capture_output=True, text=True)
        except subprocess.TimeoutExpired:
            return f"QEMU does not answer within {RESCUE_DEADLINE:.0f} s"
        for line in done.stdout.splitlines():
            log.warning("%s", line)
        *_, what, _hint = ["", f"qfsbackup cleanup ended with status {done.returncode}", "", *done.stderr.splitlines()]
        return what if done.returncode else ""


def mount_in_background(request: MountRequest, *, bound: bool = False) -> None:
    """Return once the tree can be read. `bound`: unmount when this process ends. Raises UserError."""
    request.options()  # a wrong option is refused before anything is forked
    in_background(request.work, request.rescue, request.log_level, bound=bound)


def mount_in_foreground(request: MountRequest) -> int:
    """Stay until it is unmounted; the exit status."""
    request.options()
    return in_foreground(request.work, request.rescue)
