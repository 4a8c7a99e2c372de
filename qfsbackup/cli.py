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
from pathlib import Path
from typing import NoReturn

from qfsbackup import log as logs
from qfsbackup.commands.checkpoints import delete_checkpoint, list_checkpoints
from qfsbackup.commands.cleanup import cleanup
from qfsbackup.commands.commit import commit
from qfsbackup.commands.mount import MountRequest, mount_in_background, mount_in_foreground
from qfsbackup.commands.run import default_mountpoint, make_mountpoint, run
from qfsbackup.commands.status import as_json, as_text, collect
from qfsbackup.commands.umount import umount_and_wait
from qfsbackup.errors import EXIT_SYSTEM, EXIT_USAGE, UserError

DESCRIPTION = "Shows one frozen instant of a running QEMU VM as ordinary files, for any backup tool."

SOURCE_HELP = "a VM's QMP socket (/run/vm/web1.qmp), or an NBD URI (nbd+unix:///disk?socket=/run/nbd.sock)"

OPTIONS_HELP = """\
options, comma separated after -o:
  target=NAME      the backup destination whose chain this continues:
                   incremental, once it was committed
  access=dirty     only changed chunks are readable; what the guest writes
                   elsewhere costs no copying
  discard=release  give a chunk back once it was read whole
  chunk=N          size of the pieces under chunks/
  state=DIR        where chains are kept (default /var/lib/qfsbackup)
  disks=A:B        only these disks, by name
  exclude=A:B      all but these
  fleece=DIR       where old data goes that the guest overwrites
                   (default /var/tmp)
  fleece-limit=N   break the snapshot, not the guest, when that holds more
  agent=SOCKET     the guest agent's socket
  freeze=WHEN      freeze the guest's file systems: auto (with agent=, if it
                   can be had; the default), require, off
  bwlimit=N        bytes per second read
  connections=N    NBD connections for each disk (default 4)
  uid=N gid=N      whose the files are (default: root's)
  mode=OCTAL       their permissions (default 0600)
  vm=NAME          the VM's name
  bitmap=NAME      NBD URI: the dirty bitmap that is the map
  trim-server-data NBD URI: what is punched or released, and with access=dirty
                   what is clean, is trimmed: the server's own data goes
Sizes take k, M, G and T. What mount(8) and fstab put there themselves
(ro, noauto, x-...) is accepted.
"""


class Parser(argparse.ArgumentParser):
    """Wrong usage is exit status 1, as mount(8) says; argparse's own is 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}", f"See {self.prog} --help.", EXIT_USAGE)


def main(arguments: Sequence[str] | None = None) -> int:
    """`qfsbackup`; the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return _reported(lambda: _dispatch(words))


def mount_helper(arguments: Sequence[str] | None = None) -> int:
    """`mount.qfsbackup SOURCE DIR [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]`, as mount(8) calls it."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return _reported(lambda: _mount_helper(words))


def _reported(command: Callable[[], int]) -> int:
    try:
        return command()
    except UserError as error:
        print(f"{error.what}\n{error.hint}", file=sys.stderr)  # noqa: T201  # the two lines are for the person
        return error.exit_code
    except PermissionError as error:
        print(f"{error}\nqfsbackup must run as root.", file=sys.stderr)  # noqa: T201  # as above
        return EXIT_SYSTEM
    except BrokenPipeError:  # `qfsbackup status | head`
        return 0


def _dispatch(words: list[str]) -> int:
    words, command = _split_command(words)
    arguments = _parser().parse_args(words)
    level = logging.DEBUG if arguments.verbose else logging.INFO
    logs.to_stderr(level if arguments.verbose else arguments.terminal_level)
    if arguments.name == "run":
        return _run(arguments, command, level)
    if command:
        raise UserError("only `run` takes a command after --", "See qfsbackup --help.", EXIT_USAGE)
    code: int = arguments.function(arguments, level)
    return code


def _split_command(words: list[str]) -> tuple[list[str], list[str]]:
    """What stands behind the first `--` is the command of `run`, options and all."""
    if "--" not in words:
        return words, []
    split = words.index("--")
    return words[:split], words[split + 1 :]


def _parser() -> Parser:
    parser = Parser(prog="qfsbackup", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    _mount_parsers(commands)
    _other_parsers(commands)
    return parser


def _mount_parsers(commands: argparse._SubParsersAction[Parser]) -> None:
    mount = _command(commands, "mount", "mount a snapshot and return", _mount, OPTIONS_HELP)
    _source(mount)
    mount.add_argument("directory", metavar="DIR", type=Path, help="where to mount")
    mount.add_argument("--foreground", action="store_true", help="stay until it is unmounted")
    run_parser = _command(commands, "run", "mount, run a command in the mount, unmount", None, OPTIONS_HELP)
    run_parser.usage = "qfsbackup run SOURCE [-o OPTIONS] [--mountpoint DIR] [-v] -- COMMAND..."
    _source(run_parser)
    run_parser.add_argument(
        "--mountpoint", metavar="DIR", type=Path, help="where to mount (default: the same folder for each run)"
    )
    run_parser.set_defaults(terminal_level=logging.INFO)


def _other_parsers(commands: argparse._SubParsersAction[Parser]) -> None:
    umount = _command(commands, "umount", "unmount and wait until the VM is as it was", _umount)
    umount.add_argument("directory", metavar="DIR", type=Path)
    umount.add_argument("--commit", action="store_true", help="commit first; without a commit nothing is unmounted")
    committing = _command(commands, "commit", "make this backup the base of the target's next one", _commit)
    committing.add_argument("directory", metavar="DIR", type=Path)
    status = _command(commands, "status", "what is mounted, how far it was read, how full the fleecing is", _status)
    status.add_argument("directory", metavar="DIR", type=Path, nargs="?")
    status.add_argument("--json", action="store_true", help="for programs; the README documents the shape")
    clean = _command(commands, "cleanup", "undo what a dead mount left in a VM; safe to repeat", _cleanup)
    _source(clean)
    points = _command(commands, "checkpoints", "what each target has committed of a VM", _checkpoints, OPTIONS_HELP)
    _source(points)
    points.add_argument("--delete", metavar="TARGET", help="forget a target: its next backup is a full one")
    _restore_parser(commands)


def _restore_parser(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = _command(commands, "restore", "chunks, as a backup tool restored them, become an image", _restore)
    parser.add_argument("chunks", metavar="CHUNKS_DIR", type=Path, help="chunks/<disk> of what was restored")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="a file (qcow2 if it ends so) or a block device")
    parser.add_argument("--format", choices=("raw", "qcow2"), help="instead of what OUTPUT's name says")
    parser.add_argument("--force", action="store_true", help="overwrite OUTPUT")
    parser.set_defaults(terminal_level=logging.INFO)


def _command(
    commands: argparse._SubParsersAction[Parser],
    name: str,
    description: str,
    function: Callable[[argparse.Namespace, int], int] | None,
    epilog: str | None = None,
) -> Parser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        name, help=description, description=description, epilog=epilog, formatter_class=formatter
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is done, each QMP command too")
    parser.set_defaults(function=function, terminal_level=logging.WARNING)
    return parser


def _source(parser: Parser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("-o", dest="options", metavar="OPTIONS", action="append", default=[], help="see below")


def _request(arguments: argparse.Namespace, mountpoint: Path, level: int) -> MountRequest:
    return MountRequest(_absolute(arguments.source), mountpoint.absolute(), tuple(arguments.options), level)


def _absolute(source: str) -> str:
    """A source as it is called from every folder: `cleanup` must find what `mount` named."""
    return source if "://" in source else str(Path(source.removeprefix("qmp:")).absolute())


def _mount(arguments: argparse.Namespace, level: int) -> int:
    request = _request(arguments, arguments.directory, level)
    if arguments.foreground:
        logs.to_stderr(level)
        return mount_in_foreground(request)
    mount_in_background(request)
    return 0


def _run(arguments: argparse.Namespace, command: list[str], level: int) -> int:
    if not command:
        raise UserError("run: there is no command", "Put it last, after --: -- restic backup images", EXIT_USAGE)
    mountpoint = arguments.mountpoint or make_mountpoint(default_mountpoint(_absolute(arguments.source)))
    return run(_request(arguments, mountpoint, level), command)


def _commit(arguments: argparse.Namespace, _level: int) -> int:
    commit(arguments.directory)
    return 0


def _checkpoints(arguments: argparse.Namespace, _level: int) -> int:
    source = _absolute(arguments.source)
    if arguments.delete:
        print(*delete_checkpoint(source, arguments.options, arguments.delete), sep="\n")  # noqa: T201  # the output
    else:
        print(list_checkpoints(source, arguments.options))  # noqa: T201  # the output
    return 0


def _restore(arguments: argparse.Namespace, _level: int) -> int:
    from qfsbackup.commands.restore import restore  # needs libnbd, which the supervisor must not have in it

    restore(arguments.chunks, arguments.output, arguments.format, force=arguments.force)
    return 0


def _umount(arguments: argparse.Namespace, _level: int) -> int:
    if arguments.commit:
        commit(arguments.directory)
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
    print(as_json(statuses) if arguments.json else as_text(statuses))  # noqa: T201  # this is the command's output
    return 0


def _cleanup(arguments: argparse.Namespace, _level: int) -> int:
    for line in cleanup(_absolute(arguments.source), arguments.options):
        print(line)  # noqa: T201  # this is the command's output
    return 0


def _mount_helper(words: list[str]) -> int:
    parser = Parser(prog="mount.qfsbackup", description=DESCRIPTION, epilog=OPTIONS_HELP)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    _source(parser)
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument("-f", dest="fake", action="store_true", help="check the arguments only")
    parser.add_argument("-v", dest="verbose", action="store_true")
    for ignored in ("-n", "-s"):  # no mtab to write; unknown options are refused in any case
        parser.add_argument(ignored, dest="_", action="store_true", help=argparse.SUPPRESS)
    for ignored in ("-N", "-t"):
        parser.add_argument(ignored, dest="_", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    level = logging.DEBUG if arguments.verbose else logging.INFO
    logs.to_stderr(level if arguments.verbose else logging.WARNING)
    request = _request(arguments, arguments.directory, level)
    if arguments.fake:
        request.options()
    else:
        mount_in_background(request)
    return 0
