# SPDX-License-Identifier: LGPL-2.1-or-later
"""The units are sound as systemd reads them, and the commands in them are ours as they are."""

import configparser
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.harness.mount import PROGRAM, ROOT, qfsbackup

UNITS = sorted((ROOT / "systemd").iterdir())
SERVICES = [unit for unit in UNITS if unit.suffix == ".service"]


def test_the_units_are_those_that_the_readme_speaks_of() -> None:
    names = [unit.name for unit in UNITS]
    assert names == ["qfsbackup-restic@.service", "qfsbackup-restic@.timer", "qfsbackup@.service"]


def test_systemd_finds_nothing_to_say_about_the_units(tmp_path: Path) -> None:
    for unit in UNITS:  # instances: only these have all their specifiers resolved
        copy = tmp_path / unit.name.replace("@", "@web1")
        copy.write_text(unit.read_text().replace("/usr/local/bin/qfsbackup", str(PROGRAM)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *sorted(tmp_path.iterdir())],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:", "SYSTEMD_LOG_LEVEL": "warning"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
async def test_the_commands_of_a_unit_are_understood(unit: Path) -> None:
    """Up to the source, which is not there: options and arguments are looked at before it."""
    for line in commands(unit):
        if line[0] == "/usr/local/bin/qfsbackup":
            filled = [word.replace("${OPTIONS}", "rw") for word in line]
            filled = [word.replace("${SOURCE}", "/nonexistent.qmp") for word in filled]
            done = await qfsbackup(*[word.replace("${DIRECTORY}", "/") for word in filled[1:]])
            assert "/nonexistent.qmp" in done.stderr, done
        else:
            assert shutil.which(line[0])


def commands(unit: Path) -> list[list[str]]:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # the documented way to keep the case of keys
    parser.read(unit)
    return [shlex.split(value) for key, value in parser["Service"].items() if key.startswith("Exec")]
