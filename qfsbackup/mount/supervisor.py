# SPDX-License-Identifier: LGPL-2.1-or-later
"""The small process that outlives the worker, so that nothing which kills the worker leaves the guest with our filters.

    command ---fork---> supervisor ---fork---> worker
       ^                    | waits for the worker; if it did not end in order: rescue()
       '------ one line: ready, or the error -------'

The worker does everything (FUSE, NBD, QMP) and may grow; the supervisor has imported none of that, does nothing but
wait, and runs the rescue in a process of its own. It must therefore be called before anything starts a thread or an
event loop. If the supervisor dies first, the worker gets SIGTERM and ends in order. A worker that was asked to end and
does not is killed after a while: the rescue needs none of what holds it up.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from qfsbackup import log as logs
from qfsbackup.errors import EXIT_INTERRUPTED, EXIT_MOUNT, EXIT_SYSTEM, EXIT_UNRESTORED, EXIT_USAGE, UserError
from qfsbackup.mount.notify import READY, STOPPING, notify
from qfsbackup.mount.signals import ENDING, HANDED_ON, acted_on, ending_interrupts

log = logging.getLogger(__name__)

Work = Callable[[Callable[[], None]], int]  # work(ready) -> exit status; raises UserError; calls ready() once
Rescue = Callable[[], None]

CLEAN_EXITS = {0, EXIT_USAGE, EXIT_SYSTEM, EXIT_MOUNT, EXIT_INTERRUPTED}  # the worker undid everything itself
EXIT_DEFECT = 70  # EX_SOFTWARE (sysexits.h): an exception that nobody foresaw
PR_SET_PDEATHSIG = 1  # prctl(2)
PATIENCE = 60  # seconds in which a worker that was asked to end must do so
CALLED_OFF = "nothing is mounted, and the VM is as it was"


def in_background(work: Work, rescue: Rescue, log_level: int, *, bound: bool = False) -> None:
    """Start supervisor and worker and return when the worker says that it is ready.

    `bound`: both end when this process does. Returns with SIGINT blocked: one that comes now was too late to call the
    mount off. Raises the worker's UserError, once everything it made is undone (or what cannot be is left to the
    supervisor); on Ctrl-C, then too, KeyboardInterrupt, and Interrupted on the other signals that end a mount.
    """
    reader, writer = os.pipe()
    parent = os.getpid()
    held = signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_ON)  # until they find somebody who acts on them
    supervisor = os.fork()
    if supervisor == 0:
        os.close(reader)
        os.setsid()
        detach = partial(_detach, writer, log_level)
        bound_to = parent if bound else None
        os._exit(_guarded(lambda: _supervise(_reporting(work, writer, log_level), rescue, detach, bound_to)))
    os.close(writer)
    try:
        with ending_interrupts():
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            message = _message(reader)
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    except KeyboardInterrupt as interrupt:
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)
        interrupt.args = (*interrupt.args, _call_off(supervisor, reader))
        raise
    finally:
        os.close(reader)
    if not message.get("ready"):
        _refuse(message, supervisor)


def _message(reader: int) -> dict[str, Any]:
    """What the worker has to say; nothing where it ends without."""
    line = os.read(reader, 1 << 16)  # a pipe takes and gives a short line in one piece
    return json.loads(line) if line else {}


def _call_off(supervisor: int, reader: int) -> str:
    """Let the mount that is being made end, wait until all of it is undone, and say how that went."""
    os.kill(supervisor, signal.SIGTERM)
    if _message(reader).get("exit_code") == EXIT_UNRESTORED:
        return f"not all could be undone in the VM yet; process {supervisor} goes on trying"
    os.waitpid(supervisor, 0)
    return CALLED_OFF


def _refuse(message: dict[str, Any], supervisor: int) -> NoReturn:
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
    """The same in this process; returns the worker's exit status when it has ended. Raises KeyboardInterrupt where
    that was before it was ready."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_ON)
    code = _supervise(lambda: work(partial(notify, READY)), rescue, lambda: None)
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt(CALLED_OFF)
    return code


def _supervise(
    worker: Callable[[], int], rescue: Rescue, detach: Callable[[], None], bound_to: int | None = None
) -> int:
    """`detach` is called once the worker has its own copies of all that we hold; `bound_to`: end when this parent does.

    Call it with the signals HANDED_ON blocked. The worker unblocks them when it can end in order.
    """
    _protect_from_oom(-900)
    if bound_to is not None:
        _die_with_parent(bound_to)
    supervisor = os.getpid()
    pid = os.fork()
    if pid == 0:
        _protect_from_oom(0)
        _die_with_parent(supervisor)
        os._exit(_guarded(worker))
    detach()
    _hand_signals_on(os.pidfd_open(pid))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    signal.alarm(0)
    notify(STOPPING)
    if code in CLEAN_EXITS:
        return code
    _live_without_parent()  # a `run` does not wait for what may last
    for number in HANDED_ON:
        signal.signal(number, signal.SIG_IGN)  # what ended the worker must not end the rescue
    log.error("the mount's process %s; putting the VM back as it was", _describe(code))
    rescue()
    return EXIT_SYSTEM if code == EXIT_UNRESTORED else code if code >= 0 else 128 - code


def _hand_signals_on(worker: int) -> None:
    """To the process behind this pidfd, as long as it lives; where it does not end by them in time, SIGKILL."""

    def send(number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(worker, number)

    def hand_on(number: int, _: object) -> None:
        send(number)
        if number in ENDING and not signal.getitimer(signal.ITIMER_REAL)[0]:
            signal.alarm(PATIENCE)

    def kill(*_: object) -> None:
        log.error("the mount's process has not ended within %d s; killing it", PATIENCE)
        send(signal.SIGKILL)

    signal.signal(signal.SIGALRM, kill)
    for number in acted_on():
        signal.signal(number, hand_on)


def _describe(code: int) -> str:
    if code == EXIT_UNRESTORED:
        return "could not undo all that it did"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _reporting(work: Work, writer: int, log_level: int) -> Callable[[], int]:
    """The worker of a background mount: what it has to say goes to the command that waits for it."""
    waiting = True

    def ready() -> None:
        nonlocal waiting
        waiting = False
        logs.to_syslog(log_level)
        _tell(writer, {"ready": True})
        os.close(writer)
        _detach_stdio()

    def run() -> int:
        try:
            code = work(ready)
        except UserError as error:
            if waiting:
                _tell(writer, {"what": error.what, "hint": error.hint, "exit_code": error.exit_code})
            return error.exit_code
        if waiting and code == EXIT_UNRESTORED:
            _tell(writer, {"what": "called off", "hint": "Not all is undone.", "exit_code": code})
        return code

    return run


def _tell(writer: int, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # who waited is gone
        os.write(writer, json.dumps(message).encode() + b"\n")


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


def _die_with_parent(parent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before we asked
        os.kill(os.getpid(), signal.SIGTERM)


def _live_without_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 0)


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
