# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where our programs begin and end, so that Ctrl-C while modules are loaded, or after all is done, is no traceback."""

from __future__ import annotations

import os
import signal
from typing import NoReturn

INTERRUPTED = 130  # errors.EXIT_INTERRUPTED, which is not loaded yet


def main() -> int:
    """`qfsbackup`."""
    return _call("main")


def mount_helper() -> int:
    """`mount.qfsbackup`."""
    return _call("mount_helper")


def _call(name: str) -> int:
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.default_int_handler:  # else it is ignored
        signal.signal(signal.SIGINT, _interrupted)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # `./run install` starts us with it blocked
    from qfsbackup.cli import main as cli  # loads all that a command needs

    signal.signal(signal.SIGINT, interrupt)
    code: int = getattr(cli, name)()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # too late
    return code


def _interrupted(*_: object) -> NoReturn:
    """Nothing is done yet. An exception would be lost where importlib has callbacks of its own."""
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)
