# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line: reads arguments, calls the command, turns its error into two lines and an exit status.

Exit status: 0 done, 1 wrong usage, 2 system error, 32 the mount failed (as mount(8) has it); `run` passes on its
command's, 125 is its own failure.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from qfsbackup import log as logs
from qfsbackup.cli.arguments import helper_parser, parse
from qfsbackup.cli.cleanup import cleanup
from qfsbackup.cli.commit import commit
from qfsbackup.cli.console import open_standard_descriptors, output, reported
from qfsbackup.cli.mount import MountRequest, mount_in_background, mount_in_foreground
from qfsbackup.cli.run import make_mountpoint, run
from qfsbackup.cli.status import as_json, as_text, collect
from qfsbackup.cli.umount import umount_and_wait
from qfsbackup.errors import EXIT_MOUNT, EXIT_RUN, EXIT_SYSTEM, EXIT_USAGE, UserError
from qfsbackup.options import parse_options
from qfsbackup.sources import find


def main(arguments: Sequence[str] | None = None) -> int:
    """`qfsbackup`; the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return _called(_dispatch, words)


def mount_helper(arguments: Sequence[str] | None = None) -> int:
    """`mount.qfsbackup SOURCE DIR [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]`, as mount(8) calls it."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return _called(_mount_helper, words)


def _called(command: Callable[[list[str]], int], words: list[str]) -> int:
    open_standard_descriptors()
    return reported(lambda: command(words))


def _dispatch(words: list[str]) -> int:
    if _is_from_mount_fuse(words):
        return _mount_helper(words)
    arguments, command = parse(words)
    level = logging.DEBUG if arguments.verbose else logging.INFO
    logs.to_stderr(level if arguments.verbose else arguments.terminal_level)
    if arguments.name == "run":
        return _run(arguments, command, level)
    return COMMANDS[arguments.name](arguments, level)


def _is_from_mount_fuse(words: list[str]) -> bool:
    """mount(8) has no helper for the type fuse.qfsbackup but libfuse's: `qfsbackup SOURCE DIR -o OPTIONS`."""
    return len(words) == 4 and words[2] == "-o" and words[0] not in (*COMMANDS, "run", "help")


def _request(arguments: argparse.Namespace, mountpoint: Path, level: int) -> MountRequest:
    return MountRequest(find(arguments.source), mountpoint.absolute(), tuple(arguments.options), level)


def _mount(arguments: argparse.Namespace, level: int) -> int:
    request = _request(arguments, arguments.directory, level)
    if arguments.foreground:
        logs.to_stderr(level)
        return mount_in_foreground(request)
    mount_in_background(request)
    return 0


def _run(arguments: argparse.Namespace, command: list[str], level: int) -> int:
    try:
        mountpoint = arguments.mountpoint or make_mountpoint(find(arguments.source).place)
        request = _request(arguments, mountpoint, level)
    except UserError as error:
        error.exit_code = EXIT_USAGE if error.exit_code == EXIT_USAGE else EXIT_RUN
        raise
    return run(request, command, discarded_on_purpose=arguments.discarded_on_purpose)


def _commit(arguments: argparse.Namespace, _level: int) -> int:
    commit(arguments.directory, discarded_on_purpose=arguments.discarded_on_purpose)
    return 0


def _checkpoints(arguments: argparse.Namespace, _level: int) -> int:
    from qfsbackup.cli import interruptible  # needs trio, which the supervisor must not have in it

    source, options = find(arguments.source), parse_options(arguments.options)
    forget = partial(source.forget, options, arguments.delete, others=arguments.others)
    output(*interruptible.run(forget if arguments.delete else partial(source.checkpoints, options)))
    return 0


def _restore(arguments: argparse.Namespace, _level: int) -> int:
    from qfsbackup.restore.restore import restore  # needs libnbd, which the supervisor must not have in it

    restore(arguments.chunks, arguments.output, arguments.format, force=arguments.force, torn=arguments.torn)
    return 0


def _umount(arguments: argparse.Namespace, _level: int) -> int:
    if arguments.commit:
        commit(arguments.directory, discarded_on_purpose=arguments.discarded_on_purpose)
    status = umount_and_wait(arguments.directory)
    if status["broken"]:
        raise UserError(
            f"unmounted; the snapshot was broken: {status['broken']}",
            "What was read from it is not complete: do not keep it as a backup.",
            EXIT_SYSTEM,
        )
    return 0


def _status(arguments: argparse.Namespace, _level: int) -> int:
    statuses = collect(arguments.directory)
    output(*(as_json(statuses) if arguments.json else as_text(statuses)).splitlines())
    return 0


def _cleanup(arguments: argparse.Namespace, _level: int) -> int:
    from qfsbackup.cli import interruptible  # needs trio, as above

    output(*interruptible.run(partial(cleanup, find(arguments.source), parse_options(arguments.options))))
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace, int], int]] = {
    "mount": _mount,
    "umount": _umount,
    "commit": _commit,
    "status": _status,
    "cleanup": _cleanup,
    "checkpoints": _checkpoints,
    "restore": _restore,
}


def _mount_helper(words: list[str]) -> int:
    arguments = helper_parser().parse_args(words)
    level = logging.DEBUG if arguments.verbose else logging.INFO
    logs.to_stderr(level if arguments.verbose else logging.WARNING)
    request = _request(arguments, arguments.directory, level)
    if arguments.fake:
        request.options()
        return 0
    try:
        mount_in_background(request)
    except UserError as error:
        nofail = "nofail" in ",".join(arguments.options).split(",")
        if nofail and error.exit_code == EXIT_MOUNT and not request.source.is_there():
            return 0  # mount(8), nofail: no errors for a device that does not exist
        raise
    return 0
