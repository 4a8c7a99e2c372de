# SPDX-License-Identifier: LGPL-2.1-or-later
"""The checks that need no run of the code: style, types, layers, shell scripts, and what every file must have."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = Path(sys.executable).parent
SHELL = re.compile(r"#!/bin/(ba)?sh\b")
LICENSED = {".py", ".pyi", ".c", ".service", ".timer"}
MOST_LINES = 300


def files() -> list[Path]:
    """Every file of ours; what is made beside them stands in hidden folders."""
    folders = [ROOT / name for name in (".ci", "qfsbackup", "systemd", "tests")]
    below = [path for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts]
    return [path for path in (*ROOT.iterdir(), *below) if path.is_file()]


@pytest.mark.parametrize(
    "line",
    ["ruff check", "ruff format --check", "mypy", "lint-imports"],
)
def test_a_check_is_content(line: str) -> None:
    program, *arguments = line.split()
    done = subprocess.run([PROGRAMS / program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_shell_scripts_are_clean() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = [path for path in files() if SHELL.match(path.read_bytes()[:80].decode(errors="replace"))]
    assert {path.name for path in scripts} >= {"run", "build", "init"}
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_file_names_its_license_and_stays_short() -> None:
    code = [path for path in files() if path.suffix in LICENSED]
    assert len(code) > 50
    bare = [path for path in code if "SPDX-License-Identifier: LGPL-2.1-or-later" not in path.read_text()[:200]]
    assert not bare
    long = [path for path in code if path.suffix == ".py" and len(path.read_text().splitlines()) > MOST_LINES]
    assert not long
