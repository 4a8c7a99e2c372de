# SPDX-License-Identifier: LGPL-2.1-or-later
"""`qfsbackup mount` and mount.qfsbackup: show a snapshot until it is unmounted."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qfsbackup.options import Options, check_fit, parse_options
from qfsbackup.supervisor import in_background, in_foreground
from qfsbackup.vm.presence import listens

log = logging.getLogger(__name__)

RESCUE_DEADLINE = 30.0  # seconds for one attempt
RESCUE_PAUSE = 5.0  # seconds between two
RESCUE_PATIENCE = 600.0  # seconds after which a QEMU that hangs is given up


@dataclass(frozen=True, slots=True)
class MountRequest:
    """A mount as it was asked for; `option_texts` are the arguments of -o."""

    source: str
    mountpoint: Path
    option_texts: tuple[str, ...]
    log_level: int

    def work(self, ready: Callable[[], None]) -> int:
        """The worker's part, after the fork: only here the heavy modules are imported."""
        from qfsbackup.daemon import serve  # the supervisor must not have trio and FUSE in it

        return serve(self.source, self.mountpoint, self.options(), ready)

    def options(self) -> Options:
        """What it is asked to be. Raises UserError."""
        options = parse_options(list(self.option_texts))
        check_fit(options, self.source)
        return options

    def rescue(self) -> None:
        """The worker died: fresh processes undo what it left in the VM and take the dead mount away.

        Tried again while QEMU hangs: it may come back, and would then have our filters for ever.
        """
        give_up = time.monotonic() + RESCUE_PATIENCE
        while not self._undo():
            if not listens(self.source):
                log.warning("QEMU is gone, and with it what was to be undone")
                return
            if time.monotonic() > give_up:
                log.error("giving up; once QEMU answers: qfsbackup cleanup %s", self.source)
                return
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # who has no time may end the waiting
            time.sleep(RESCUE_PAUSE)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _undo(self) -> bool:
        options = [word for text in self.option_texts for word in ("-o", text)]
        command = [sys.executable, "-m", "qfsbackup", "cleanup", self.source, *options]
        try:
            done = subprocess.run(command, timeout=RESCUE_DEADLINE, check=False, capture_output=True, text=True)
        except subprocess.TimeoutExpired as error:
            log.warning("%s", error)
            return False
        for line in (done.stdout + done.stderr).splitlines():
            log.warning("%s", line)
        return done.returncode == 0


def mount_in_background(request: MountRequest, *, bound: bool = False) -> None:
    """Return once the tree can be read. `bound`: unmount when this process ends. Raises UserError."""
    request.options()  # a wrong option is refused before anything is forked
    in_background(request.work, request.rescue, request.log_level, bound=bound)


def mount_in_foreground(request: MountRequest) -> int:
    """Stay until it is unmounted; the exit status."""
    request.options()
    return in_foreground(request.work, request.rescue)
