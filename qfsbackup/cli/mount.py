# SPDX-License-Identifier: LGPL-2.1-or-later
"""`qfsbackup mount` and mount.qfsbackup: show a snapshot until it is unmounted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qfsbackup.contracts import Source
from qfsbackup.mount.rescue import rescue
from qfsbackup.mount.supervisor import in_background, in_foreground
from qfsbackup.options import Options, parse_options


@dataclass(frozen=True, slots=True)
class MountRequest:
    """A mount as it was asked for; `option_texts` are the arguments of -o."""

    source: Source
    mountpoint: Path
    option_texts: tuple[str, ...]
    log_level: int

    def work(self, ready: Callable[[], None]) -> int:
        """The worker's part, after the fork: only here the heavy modules are imported."""
        from qfsbackup.mount.daemon import serve  # the supervisor must not have trio and FUSE in it

        return serve(self.source, self.mountpoint, self.options(), ready)

    def options(self) -> Options:
        """What it is asked to be. Raises UserError."""
        options = parse_options(list(self.option_texts))
        self.source.check(options)
        return options

    def rescue(self) -> None:
        """The supervisor's part."""
        rescue(self.source, self.option_texts)


def mount_in_background(request: MountRequest, *, bound: bool = False) -> None:
    """Return once the tree can be read. `bound`: unmount when this process ends. Raises UserError."""
    request.options()  # a wrong option is refused before anything is forked
    in_background(request.work, request.rescue, request.log_level, bound=bound)


def mount_in_foreground(request: MountRequest) -> int:
    """Stay until it is unmounted; the exit status."""
    request.options()
    return in_foreground(request.work, request.rescue)
