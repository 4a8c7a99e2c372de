# SPDX-License-Identifier: LGPL-2.1-or-later
"""The C modules, built with the sanitizers for addresses and undefined behaviour, under the tests that use them most.

SANITIZE=all runs all of tests/nbd and tests/fuse. What the sanitizers find ends the process, and so fails the test.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FLAGS = [
    *["-shared", "-fPIC", "-g", "-O1", "-fno-omit-frame-pointer"],
    *["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
]
USUAL = ["tests/nbd/test_lane.py", "tests/fuse/test_calls.py", "tests/fuse/test_defects.py"]
ALL = ["tests/nbd", "tests/fuse"]
# Only Python needs the sanitizers' libraries, and needs them before anything else: servers of the tests go without.
SITE = """\
import os, sys
if os.environ.pop("LD_PRELOAD", None) is None:
    os.execve(sys.executable, sys.orig_argv, {**os.environ, "LD_PRELOAD": os.environ["SANITIZERS"]})
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The product and its tests, with C modules that look what they do."""
    for folder in ("qfsbackup", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / ".cache").symlink_to(ROOT / ".cache")
    (tmp_path / "sitecustomize.py").write_text(SITE)
    with (ROOT / "pyproject.toml").open("rb") as file:
        for module in tomllib.load(file)["tool"]["setuptools"]["ext-modules"]:
            build(module, tmp_path)
    return tmp_path


def build(module: dict[str, Any], folder: Path) -> None:
    """As setuptools does, but for the flags."""
    output = folder / (module["name"].replace(".", "/") + ".so")
    folders = [sysconfig.get_path("include"), *module.get("include-dirs", ())]
    line = ["gcc", *FLAGS, *module["extra-compile-args"], *(f"-I{path}" for path in folders), "-o", str(output)]
    line += [*module["sources"], *(f"-l{library}" for library in module.get("libraries", ()))]
    subprocess.run(line, cwd=folder, check=True)


def library(name: str) -> str:
    """Where gcc has it."""
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


@pytest.mark.timeout(600)
def test_the_c_modules_touch_nothing_that_is_not_theirs(tree: Path) -> None:
    libraries = ":".join(map(library, ("libasan.so", "libubsan.so")))
    environment = {
        **os.environ,
        "ASAN_OPTIONS": f"detect_leaks=0:abort_on_error=1:log_path={tree}/found",
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={tree}/found",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(tree),
        "SANITIZERS": libraries,
        "QEMU": os.environ.get("QEMU", "10"),
    }
    tests = ALL if os.environ.get("SANITIZE") == "all" else USUAL
    with tempfile.TemporaryDirectory(prefix="sanitized-") as short:  # sockets are made there
        line = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--basetemp={short}/t", *tests]
        done = subprocess.run(line, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    found = [path.read_text() for path in tree.glob("found.*")]
    assert not found, found[0]
    assert done.returncode == 0, done.stdout + done.stderr
