# SPDX-License-Identifier: LGPL-2.1-or-later
"""restic, borg and rsync as a person calls them below a mount, and what each says it read."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.harness.mount import command

WHAT = "chunks config vm.json"


class Tool(Protocol):
    """A backup tool with its destination."""

    @property
    def name(self) -> str: ...

    async def setup(self) -> None:
        """Make the destination."""

    def command(self) -> str:
        """The shell command that backs up the folder it is run in."""

    def read(self, log: str) -> set[str]:
        """The files of which the tool says that it took their content."""

    def skipped(self, log: str) -> set[str]:
        """The files of which it says that they have not changed."""

    async def restore(self, folder: Path) -> Path:
        """The newest backup, as files below the path that is returned. `folder` is not there yet."""


async def _succeed(line: str, cwd: Path | None = None) -> None:
    done = await command("/bin/sh", "-c", line, cwd=cwd)
    assert done.code == 0, done


def _chunks(paths: set[str]) -> set[str]:
    return {path for path in paths if path.startswith("chunks/") and not path.endswith("/")}


@dataclass(frozen=True)
class Restic:
    """restic finds the parent snapshot by host and paths."""

    folder: Path
    name: str = "restic"

    @property
    def _restic(self) -> str:
        repository = shlex.quote(str(self.folder / "restic"))
        return f"RESTIC_PASSWORD=secret restic --no-cache -r {repository}"

    async def setup(self) -> None:
        await _succeed(f"{self._restic} init")

    def command(self) -> str:
        return f"{self._restic} backup --host vm --json --verbose=2 {WHAT}"

    def read(self, log: str) -> set[str]:
        return self._items(log, "new", "modified")

    def skipped(self, log: str) -> set[str]:
        return self._items(log, "unchanged")

    def _items(self, log: str, *actions: str) -> set[str]:
        lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
        return _chunks({line["item"].lstrip("/") for line in lines if line.get("action") in actions})

    def summary(self, log: str) -> dict[str, int]:
        """restic's own summary."""
        lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
        [summary] = [line for line in lines if line["message_type"] == "summary"]
        return {key: value for key, value in summary.items() if isinstance(value, int)}

    async def restore(self, folder: Path) -> Path:
        await _succeed(f"{self._restic} restore latest --target {shlex.quote(str(folder))}")
        return folder


@dataclass(frozen=True)
class Borg:
    """borg remembers files by their path as it was given, and locks a repository for good when it is killed."""

    folder: Path
    name: str = "borg"

    @property
    def _borg(self) -> str:
        base, repository = self.folder / "borg-base", self.folder / "borg"
        settings = f"BORG_BASE_DIR={base} BORG_REPO={repository} BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes"
        return f"export {settings}; borg"

    async def setup(self) -> None:
        await _succeed(f"{self._borg} init -e none")

    def command(self) -> str:
        return f"{self._borg} break-lock; borg create --list '::{{utcnow:%s.%f}}' {WHAT}"

    def read(self, log: str) -> set[str]:
        return self._items(log, "A ", "M ", "C ")

    def skipped(self, log: str) -> set[str]:
        return self._items(log, "U ")

    def _items(self, log: str, *flags: str) -> set[str]:
        return _chunks({line[2:] for line in log.splitlines() if line.startswith(flags)})

    async def restore(self, folder: Path) -> Path:
        folder.mkdir()  # noqa: ASYNC240 - a few files
        await _succeed(f"{self._borg} extract ::$(borg list --last 1 --short)", cwd=folder)
        return folder


@dataclass(frozen=True)
class Rsync:
    """rsync compares size and mtime with the copy that is its backup."""

    folder: Path
    name: str = "rsync"

    @property
    def copy(self) -> Path:
        """The backup itself."""
        return self.folder / "rsync"

    async def setup(self) -> None:
        self.copy.mkdir()

    def command(self) -> str:
        return f"rsync -a --delete -ii {WHAT} {shlex.quote(str(self.copy))}/"

    def read(self, log: str) -> set[str]:
        return _chunks({line.split(" ", 1)[1] for line in log.splitlines() if line.startswith(">f")})

    def skipped(self, log: str) -> set[str]:
        """-i twice names what is left as it is, too."""
        return _chunks({line.split(" ", 1)[1].strip() for line in log.splitlines() if line.startswith(".f  ")})

    async def restore(self, folder: Path) -> Path:  # noqa: ARG002 - the signature is Tool's
        return self.copy


def all_tools(folder: Path) -> list[Tool]:
    """The three of them, with their destinations in `folder`."""
    return [Restic(folder), Borg(folder), Rsync(folder)]
