# SPDX-License-Identifier: LGPL-2.1-or-later
"""The program that `run` is to start, found before anything else is done.

It is looked for where the caller stands: the command itself runs in the mount, where nothing can be executed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from qfsbackup.errors import UserError

SCRIPT_START = 128  # bytes of a script's first line that matter (Linux 5.1 and later take 256)


def find_executable(name: str) -> Path:
    """The absolute path of what a shell would run here. Raises UserError."""
    found = shutil.which(name)
    if found is None:
        raise _refused(name)
    path = Path(found).absolute()
    interpreter = _interpreter(path)
    if interpreter is not None and not Path(interpreter).exists():
        raise UserError(f"cannot run {name}: its first line names {interpreter}, which is not there", "Install that.")
    return path


def _refused(name: str) -> UserError:
    path = Path(name)
    if "/" not in name:
        hint = "Is it installed, and in the PATH?"
        if " " in name:
            hint = "Leave the quotes out, or name a shell: -- sh -c '...'"
        return UserError(f"cannot run {name}: no such command", hint)
    if path.is_dir():
        return UserError(f"cannot run {name}: it is a folder", "Name a program.")
    if path.exists():
        return UserError(f"cannot run {name}: it is not executable", f"Make it so: chmod +x {name}")
    return UserError(f"cannot run {name}: no such file", "The path counts from where you are now.")


def _interpreter(path: Path) -> str | None:
    """What a script's `#!` names; None where it is no script, or may not be read."""
    try:
        with path.open("rb") as file:
            first = file.read(SCRIPT_START).split(b"\n")[0]
    except OSError:
        return None
    words = first.removeprefix(b"#!").split()
    return os.fsdecode(words[0]) if first.startswith(b"#!") and words else None
