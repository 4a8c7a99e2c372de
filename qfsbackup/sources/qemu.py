# SPDX-License-Identifier: LGPL-2.1-or-later
"""The source `/PATH`: a running QEMU VM with a QMP socket that is ours alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from qfsbackup.sources.vm import VmSource
from qfsbackup.vm.monitor import Monitor
from qfsbackup.vm.presence import is_off


class QemuSource(VmSource):
    """The VM behind a QMP socket."""

    def __init__(self, socket: Path) -> None:
        super().__init__(
            str(socket), place=os.path.realpath(socket) if socket.exists() else str(socket), fallback=socket.stem
        )
        self._socket = socket

    def connect(self, on_gone: Callable[[str], None]) -> AbstractAsyncContextManager[Monitor]:
        from qfsbackup.vm.monitors.qmp_socket import connect  # needs qemu.qmp

        return connect(self._socket, on_gone)

    def is_there(self) -> bool:
        return not is_off(self._socket)


def source(text: str) -> QemuSource:
    """The VM behind the QMP socket at this path."""
    return QemuSource(Path(text).absolute())
