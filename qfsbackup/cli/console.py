# SPDX-License-Identifier: LGPL-2.1-or-later
"""Between a command and whoever called it: the three standard descriptors, the output, and how every command ends.

An error is two lines, Ctrl-C is one, an output that cannot be written is an error, and one that nobody reads is none.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from qfsbackup.errors import EXIT_INTERRUPTED, EXIT_SYSTEM, Interrupted, UserError
from qfsbackup.log import printable


def open_standard_descriptors() -> None:
    """Let 0, 1 and 2 be open, on /dev/null where the caller closed them.

    Whatever else is opened would take their numbers (open(2): the lowest free one), and be taken for what they are.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


def reported(command: Callable[[], int]) -> int:
    """Run a command, and tell a person what it raised; the exit status."""
    try:
        code = _code(command)
        with _writing():
            sys.stdout.flush()
    except BrokenPipeError:  # `qfsbackup status | head`
        _give_up_output()
        code = 0
    except UserError as error:
        code = _say(error.exit_code, error.what, error.hint)
    except PermissionError as error:
        code = _say(EXIT_SYSTEM, str(error), "qfsbackup must run as root.")
    except (KeyboardInterrupt, BaseExceptionGroup) as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        code = error.exit_code if isinstance(error, Interrupted) else EXIT_INTERRUPTED
        _say(code, _interrupted(error))
    return code


def _code(command: Callable[[], int]) -> int:
    try:
        return command()
    except SystemExit as end:  # argparse, after --help
        return int(end.code or 0)


def output(*lines: str) -> None:
    """Print what a command is for. Raises UserError where it cannot be written, BrokenPipeError where nobody reads."""
    with _writing():
        print(*map(printable, lines), sep="\n", end="\n" if lines else "", flush=True)  # noqa: T201  # the one place


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        _give_up_output()
        raise UserError(f"cannot write the output: {error.strerror}", "Is the disk full?", EXIT_SYSTEM) from None


def _give_up_output() -> None:
    """What the output still holds must not be tried again at the end of the process."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _interrupted(error: BaseException) -> str:
    """What to say of a Ctrl-C; a group of anything else is raised again."""
    if isinstance(error, BaseExceptionGroup):
        interrupts, others = error.split(KeyboardInterrupt)
        if interrupts is None or others is not None:
            raise error
        return "interrupted"
    return ": ".join(["interrupted", *map(str, error.args)])


def _say(code: int, *lines: str) -> int:
    with suppress(OSError):  # the exit status says it too
        print(*map(printable, lines), sep="\n", file=sys.stderr, flush=True)  # noqa: T201  # the lines are for the person
    return code
