# SPDX-License-Identifier: LGPL-2.1-or-later
"""The two kinds of error that cross layers: one for the person, one for the reader of a file.

Everything else is a defect and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import signal

EXIT_USAGE = 1  # mount(8): incorrect invocation or permissions
EXIT_SYSTEM = 2  # mount(8): system error
EXIT_MOUNT = 32  # mount(8): mount failure
EXIT_UNRESTORED = 75  # EX_TEMPFAIL (sysexits.h), from worker to supervisor: something of ours is still in QEMU
EXIT_INTERRUPTED = 130  # by Ctrl-C, as a shell says it: 128 + SIGINT
EXIT_RUN = 125  # `qfsbackup run`: our own failure, not the command's


class UserError(Exception):
    """Something the person in front of us can act on; printed as two lines, without a traceback."""

    def __init__(self, what: str, hint: str, exit_code: int = EXIT_MOUNT) -> None:
        """`what` went wrong, in one sentence; `hint` is what to do about it; `exit_code` as mount(8) has it."""
        super().__init__(what)
        self.what = what
        self.hint = hint
        self.exit_code = exit_code


class Interrupted(KeyboardInterrupt):  # no more an error than its base is
    """Another signal than SIGINT asked this process to end, where that is handled in the same way."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.exit_code = 128 + number  # as a shell says it


def only_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one exception inside, however deep; where there are more, what has them all."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


class FsError(Exception):
    """An operation on a file fails with `errno`; `fuse/` hands it to the kernel."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(f"{message} ({errno.errorcode.get(number, number)}: {os.strerror(number)})")
        self.errno = number
