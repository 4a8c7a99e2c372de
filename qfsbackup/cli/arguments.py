# SPDX-License-Identifier: LGPL-2.1-or-later
"""The words of the command line: what each command takes, and what its --help says."""

from __future__ import annotations

import argparse
import logging
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from qfsbackup import __version__
from qfsbackup.cli.console import output
from qfsbackup.errors import EXIT_USAGE, UserError
from qfsbackup.options import OPTIONS
from qfsbackup.sources import USAGE

DESCRIPTION = "Shows one frozen instant of a running QEMU VM as ordinary files, for any backup tool."

MOUNT_NOTE = """\
Sizes take k, M, G and T. What mount(8) and fstab put there themselves
(noauto, x-...) is accepted."""
OTHERS_NOTE = """\
All others that a mount takes are accepted and do nothing: give what the
mount had."""
IMAGE_NOTE = "Of a VM that is off, name an image instead: what is in it is shown and deleted.\n\n"
OPTION_WIDTH = max(len(name + option.usage) for name, option in OPTIONS.items())

CHECKPOINTS_USAGE = """\
qfsbackup checkpoints SOURCE|IMAGE.qcow2 [-o OPTIONS] [-v]
                             [--delete TARGET [--others]]"""
RUN_USAGE = "qfsbackup run SOURCE [-o OPTIONS] [--mountpoint DIR] [-v] -- COMMAND..."
RUN_EXAMPLE = "qfsbackup run SOURCE -o target=nas -- restic backup chunks config vm.json"


class Parser(argparse.ArgumentParser):
    """Wrong usage is exit status 1, as mount(8) says; argparse's own is 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}", f"See {self.prog} --help.", EXIT_USAGE)

    def _print_message(self, message: str, _file: object = None) -> None:
        """What --help and --version say: an error where it cannot be written."""
        output(*message.splitlines())


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """`qfsbackup`'s arguments, and the command behind `--`, which is `run`'s.

    `name` is the command's, `terminal_level` what it logs to the terminal without -v.
    Raises UserError, and SystemExit after --help.
    """
    before, command = _split_command(words)
    parser = _parser()
    if before[:1] == ["help"]:
        before = [*before[1:2], "--help"]
    arguments, unknown = parser.parse_known_args(before)
    if unknown and arguments.name == "run" and not unknown[0].startswith("-"):
        raise UserError(f"run: there is no -- before {unknown[0]}", f"Put one there: {RUN_EXAMPLE}", EXIT_USAGE)
    if unknown:
        raise _unknown(arguments.name, unknown)
    if arguments.name == "run" and not command:
        raise UserError("run: there is no command", f"Put it last, after --: {RUN_EXAMPLE}", EXIT_USAGE)
    if command and arguments.name != "run":
        raise UserError("only `run` takes a command after --", "See qfsbackup --help.", EXIT_USAGE)
    return arguments, command


def _unknown(name: str, words: Sequence[str]) -> UserError:
    option = words[0].removeprefix("--").partition("=")[0]
    hint = (
        f"{option} is an option of the mount: -o {option}=..." if option in OPTIONS else f"See qfsbackup {name} --help."
    )
    return UserError(f"qfsbackup {name}: unrecognized arguments: {' '.join(words)}", hint, EXIT_USAGE)


def _split_command(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands behind the first `--` is the command of `run`, options and all."""
    if "--" not in words:
        return list(words), []
    split = words.index("--")
    return list(words[:split]), list(words[split + 1 :])


def _options_help(command: str, note: str) -> str:
    """The options that `command` heeds; of those of a mount `mount` heeds all."""
    lines = ["options, comma separated after -o:"]
    for name, option in OPTIONS.items():
        if command in ("mount", *option.heeded):
            first = f"  {name + option.usage:{OPTION_WIDTH}} "
            lines += textwrap.wrap(option.help, 80, initial_indent=first, subsequent_indent=" " * len(first))
    return "\n".join([*lines, note])


def _parser() -> Parser:
    parser = Parser(prog="qfsbackup", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"qfsbackup {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    _mount_parsers(commands)
    _ending_parsers(commands)
    _looking_parsers(commands)
    _restore_parser(commands)
    commands.add_parser("help", help="what `qfsbackup help COMMAND` says, or `qfsbackup COMMAND --help`")
    return parser


def _mount_parsers(commands: argparse._SubParsersAction[Parser]) -> None:
    help_text = _options_help("mount", MOUNT_NOTE)
    mount = _command(commands, "mount", "mount a snapshot and return", help_text)
    _source(mount)
    mount.add_argument("directory", metavar="DIR", type=Path, help="where to mount")
    mount.add_argument("--foreground", action="store_true", help="stay until it is unmounted")
    run_parser = _command(commands, "run", "mount, run a command in the mount, unmount", help_text)
    run_parser.usage = RUN_USAGE
    _source(run_parser)
    run_parser.add_argument(
        "--mountpoint", metavar="DIR", type=Path, help="where to mount (default: the same folder for each run)"
    )
    _on_purpose(run_parser)
    run_parser.set_defaults(terminal_level=logging.INFO)


def _ending_parsers(commands: argparse._SubParsersAction[Parser]) -> None:
    umount = _command(commands, "umount", "unmount and wait until the VM is as it was")
    umount.add_argument("directory", metavar="DIR", type=Path)
    umount.add_argument("--commit", action="store_true", help="commit first; without a commit nothing is unmounted")
    _on_purpose(umount)
    committing = _command(commands, "commit", "make this backup the base of the target's next one")
    committing.add_argument("directory", metavar="DIR", type=Path)
    _on_purpose(committing)
    help_text = _options_help("cleanup", OTHERS_NOTE)
    clean = _command(commands, "cleanup", "undo what a dead mount left in a VM; safe to repeat", help_text)
    _source(clean)


def _looking_parsers(commands: argparse._SubParsersAction[Parser]) -> None:
    status = _command(commands, "status", "what is mounted, how far it was read, how full the fleecing is")
    status.add_argument("directory", metavar="DIR", type=Path, nargs="?")
    status.add_argument("--json", action="store_true", help="for programs; the README documents the shape")
    help_text = IMAGE_NOTE + _options_help("checkpoints", OTHERS_NOTE)
    points = _command(commands, "checkpoints", "what each target has committed of a VM", help_text)
    _source(points)
    points.usage = CHECKPOINTS_USAGE
    points.add_argument("--delete", metavar="TARGET", help="forget a target: its next backup is a full one")
    points.add_argument("--others", action="store_true", help="also what another state folder or VM made for TARGET")


def _restore_parser(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = _command(commands, "restore", "chunks, as a backup tool restored them, become an image")
    parser.add_argument("chunks", metavar="CHUNKS_DIR", type=Path, help="chunks/<disk> of what was restored")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="a file (qcow2 if it ends so) or a block device")
    parser.add_argument("--format", choices=("raw", "qcow2"), help="instead of what OUTPUT's name says")
    parser.add_argument("--force", action="store_true", help="overwrite OUTPUT, if nobody uses it")
    parser.add_argument(
        "--torn", action="store_true", help="restore chunks that are not all of one backup, or not all of it"
    )
    parser.set_defaults(terminal_level=logging.INFO)


def _command(
    commands: argparse._SubParsersAction[Parser], name: str, description: str, epilog: str | None = None
) -> Parser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        name, help=description, description=description, epilog=epilog, formatter_class=formatter
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is done, each QMP command too")
    parser.set_defaults(terminal_level=logging.WARNING)
    return parser


def _on_purpose(parser: Parser) -> None:
    text = "commit also what was discarded before anybody had read it"
    parser.add_argument("--discarded-on-purpose", action="store_true", help=text)


def _source(parser: Parser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=USAGE)
    parser.add_argument("-o", dest="options", metavar="OPTIONS", action="append", default=[], help="see below")


def helper_parser() -> Parser:
    """mount.qfsbackup's, as mount(8) calls it."""
    parser = Parser(prog="mount.qfsbackup", description=DESCRIPTION, epilog=_options_help("mount", MOUNT_NOTE))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    _source(parser)
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument("-f", dest="fake", action="store_true", help="check the arguments only")
    parser.add_argument("-v", dest="verbose", action="store_true")
    for ignored in ("-n", "-s"):  # no mtab to write; unknown options are refused in any case
        parser.add_argument(ignored, dest="_", action="store_true", help=argparse.SUPPRESS)
    for ignored in ("-N", "-t"):
        parser.add_argument(ignored, dest="_", help=argparse.SUPPRESS)
    return parser
