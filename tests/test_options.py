# SPDX-License-Identifier: LGPL-2.1-or-later
"""An option is written once: what parses it, what --help and README.md say, and the field it becomes are the same."""

from dataclasses import asdict, fields
from pathlib import Path

import pytest

from qfsbackup.cli.arguments import helper_parser
from qfsbackup.errors import UserError
from qfsbackup.options import OPTIONS, Options, parse_options
from tests.harness.mount import qfsbackup

README = Path(__file__).parents[1] / "README.md"
GIVEN = {  # of each option something that it takes, and what that means
    "target": ("nas", "nas"),
    "state": ("/s", Path("/s")),
    "bitmaps": ("transient", "transient"),
    "chunk": ("64k", 64 << 10),
    "access": ("dirty", "dirty"),
    "discard": ("release", "release"),
    "disks": (":vda:vdb", ("vda", "vdb")),
    "exclude": ("vdc", ("vdc",)),
    "agent": ("/a", Path("/a")),
    "freeze": ("off", "off"),
    "recipe": ("jobs", "jobs"),
    "fleece": ("/f", Path("/f")),
    "fleece-limit": ("1G", 1 << 30),
    "bwlimit": ("10MiB", 10 << 20),
    "connections": ("016", 16),
    "uid": ("1", 1),
    "gid": ("2", 2),
    "mode": ("0440", 0o440),
    "vm": ("web=1", "web=1"),
    "bitmap": ("b0", "b0"),
}
FLAGS = ("ro", "trim-server-data")


def test_the_readme_has_each_option_as_it_is_written() -> None:
    table = README.read_text().partition("\n| option | |\n|---|---|\n")[2].partition("\n\n")[0]
    assert table.splitlines() == [f"| `{name}{one.usage}` | {one.help} |" for name, one in OPTIONS.items()]


@pytest.mark.parametrize("command", ["mount", "run", "cleanup", "checkpoints"])
async def test_help_names_the_options_that_a_command_heeds_and_no_other(command: str) -> None:
    shown = (await qfsbackup(command, "--help")).stdout.partition("comma separated after -o:\n")[2]
    named = [line.split()[0] for line in shown.splitlines() if line.startswith("  ") and not line.startswith("   ")]
    heeded = [(name, one) for name, one in OPTIONS.items() if command in ("mount", "run", *one.heeded)]
    assert named == [name + one.usage for name, one in heeded]
    words = " ".join(shown.split())
    assert all(one.help in words for _, one in heeded)


def test_mount_8_helper_says_the_same() -> None:
    assert all(name + one.usage in helper_parser().format_help() for name, one in OPTIONS.items())


def test_each_option_becomes_the_field_of_its_name() -> None:
    assert sorted([*GIVEN, *FLAGS]) == sorted(OPTIONS)
    options = parse_options([",".join([*(f"{name}={text}" for name, (text, _) in GIVEN.items()), *FLAGS])])
    expected = {name: value for name, (_, value) in GIVEN.items()} | dict.fromkeys(FLAGS, True)
    assert asdict(options) == {name.replace("-", "_"): value for name, value in expected.items()}
    assert len(fields(Options)) == len(OPTIONS)


@pytest.mark.parametrize(("texts", "read_only"), [(["ro,rw"], False), (["rw", "ro"], True), (["defaults"], False)])
def test_of_ro_and_rw_the_later_one_counts(texts: list[str], read_only: bool) -> None:
    assert parse_options(texts).ro is read_only


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_is_refused_with_its_name_where_its_value_is_wrong(name: str) -> None:
    with pytest.raises(UserError, match=name):
        parse_options([f"{name}=" + ("1" if name in FLAGS else "")])
