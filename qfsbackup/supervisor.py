# SPDX-License-Identifier: LGPL-2.1-or-later
"""The small process that outlives the worker, so that nothing which kills the worker leaves the guest with our filters.

    command ---fork---> supervisor ---fork---> worker
       ^                    | waits for the worker; if it did not end in order: rescue()
       '------ one line: ready, or the error -------'

The worker does everything (FUSE, NBD, QMP) and may grow; the supervisor has imported none of that, does nothing but
wait, and runs the rescue in a process of its own. It must therefore be called before anything starts a thread or an
event loop. If the supervisor dies first, the worker gets SIGTERM and ends in order.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

from qfsbackup import log as logs
from qfsbackup.errors import EXIT_MOUNT, EXIT_SYSTEM, EXIT_UNRESTORED, EXIT_USAGE, UserError

log = logging.getLogger(__name__)

Work = Callable[[Callable[[], None]], int]  # work(ready) -> exit status; raises UserError; calls ready() once
Rescue = Callable[[], None]

CLEAN_EXITS = {0, EXIT_USAGE, EXIT_SYSTEM, EXIT_MOUNT}  # the worker undid everything itself
EXIT_DEFECT = 70  # EX_SOFTWARE (sysexits.h): an exception that nobody foresaw
PR_SET_PDEATHSIG = 1  # prctl(2)
HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def in_background(work: Work, rescue: Rescue, log_level: int, *, bound: bool = False) -> None:
    """Start supervisor and worker and return when the worker says that it is ready.

    `bound`: both end when this process does. Raises the worker's UserError, once everything it made is undone (unless
    QEMU hangs).
    """
    reader, writer = os.pipe()
    supervisor = os.fork()
    if supervisor == 0:
        os.close(reader)
        os.setsid()
        detach = partial(_detach, writer, log_level)
        os._exit(_guarded(lambda: _supervise(_reporting(work, writer, log_level), rescue, detach, bound=bound)))
    os.close(writer)
    with os.fdopen(reader) as lines:
        line = lines.readline()
    message = json.loads(line) if line else {}
    if message.get("ready"):
        return
    if message.get("exit_code") == EXIT_UNRESTORED:
        message["exit_code"] = EXIT_MOUNT  # the supervisor goes on trying
    else:
        os.waitpid(supervisor, 0)
    if message:
        raise UserError(**message)
    raise UserError(
        "the mount's process died before it was ready",
        "The VM was put back as it was. The system's log may say why; try again with -v --foreground.",
        EXIT_SYSTEM,
    )


def in_foreground(work: Work, rescue: Rescue) -> int:
    """The same in this process; returns the worker's exit status when it has ended."""
    return _supervise(lambda: work(_notify_systemd), rescue, lambda: None)


def _supervise(worker: Callable[[], int], rescue: Rescue, detach: Callable[[], None], *, bound: bool = False) -> int:
    """`detach` is called once the worker has its own copies of all that we hold."""
    _protect_from_oom(-900)
    if bound:
        _die_with_parent()
    pid = os.fork()
    if pid == 0:
        _protect_from_oom(0)
        _die_with_parent()
        os._exit(_guarded(worker))
    detach()
    _hand_signals_on(os.pidfd_open(pid))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code in CLEAN_EXITS:
        return code
    for number in HANDED_ON:
        signal.signal(number, signal.SIG_IGN)  # what ended the worker must not end the rescue
    log.error("the mount's process %s; putting the VM back as it was", _describe(code))
    rescue()
    return EXIT_SYSTEM if code == EXIT_UNRESTORED else code if code >= 0 else 128 - code


def _hand_signals_on(worker: int) -> None:
    """To the process behind this pidfd, as long as it lives."""

    def hand_on(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(worker, number)

    for number in HANDED_ON:
        signal.signal(number, hand_on)


def _describe(code: int) -> str:
    if code == EXIT_UNRESTORED:
        return "got no answer from QEMU"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _reporting(work: Work, writer: int, log_level: int) -> Callable[[], int]:
    """The worker of a background mount: what it has to say goes to the command that waits for it."""

    def ready() -> None:
        logs.to_syslog(log_level)
        os.write(writer, b'{"ready": true}\n')
        os.close(writer)
        _detach_stdio()

    def run() -> int:
        try:
            return work(ready)
        except UserError as error:
            message = {"what": error.what, "hint": error.hint, "exit_code": error.exit_code}
            with contextlib.suppress(OSError):  # after ready() nobody listens any more
                os.write(writer, json.dumps(message).encode() + b"\n")
            return error.exit_code

    return run


def _guarded(work: Callable[[], int]) -> int:
    """A forked child must not return into its parent's code, whatever happens."""
    try:
        return work()
    except UserError as error:
        logs.say(error)
        return error.exit_code
    except BaseException:  # the process ends here; the supervisor acts on the exit status
        log.critical("a defect ended the mount", exc_info=True)
        return EXIT_DEFECT


def _die_with_parent() -> None:
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before we asked
        os.kill(os.getpid(), signal.SIGTERM)


def _protect_from_oom(score: int) -> None:
    with contextlib.suppress(OSError):  # needs CAP_SYS_RESOURCE; without it the kernel chooses by size
        Path("/proc/self/oom_score_adj").write_text(str(score))


def _detach(writer: int, log_level: int) -> None:
    """The supervisor of a background mount leaves the terminal to whoever comes next."""
    os.close(writer)
    logs.to_syslog(log_level)
    _detach_stdio()


def _detach_stdio() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)


def _notify_systemd() -> None:
    """sd_notify(3): the unit is up."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
            connection.connect(address.replace("@", "\0", 1) if address.startswith("@") else address)
            connection.sendall(b"READY=1")
