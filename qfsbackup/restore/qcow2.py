# SPDX-License-Identifier: LGPL-2.1-or-later
"""A qcow2 image, written through a qemu-nbd of our own: nobody knows the format better.

libnbd starts the server on a socket of its own (systemd socket activation) and ends it. Everything here blocks: it is
for a command that does nothing else.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qfsbackup.errors import EXIT_SYSTEM, UserError
from qfsbackup.nbd.handle import Handle, libnbd


class Qcow2Image:
    """An image being written; all that is not written is zeros."""

    def __init__(self, handle: Handle, path: Path) -> None:
        """`path` is an empty image. Raises OSError."""
        self._handle = handle
        server = ["qemu-nbd", "--format=qcow2", "--cache=writeback", str(path)]
        _raising_os_error(lambda: handle.connect_systemd_socket_activation(server))

    def write(self, offset: int, content: bytes) -> None:
        """Write `content` at `offset`, in bytes. Raises OSError."""
        _raising_os_error(lambda: self._handle.pwrite(content, offset))

    def flush(self) -> None:
        """Put it on the disk and let the server go. Raises OSError."""
        _raising_os_error(self._handle.flush)
        _raising_os_error(self._handle.shutdown)

    def close(self) -> None:
        """libnbd ends the server, and waits for it, with the last reference to the handle."""
        del self._handle


@contextmanager
def qcow2_image(path: Path, size: int) -> Iterator[Qcow2Image]:
    """A new qcow2 image of `size` bytes at `path`; it is on the disk when the block ends. Raises UserError, OSError."""
    try:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(size)], check=True, capture_output=True)
    except FileNotFoundError:
        raise UserError(
            "qemu-img is missing, and qcow2 needs it", "Install qemu-utils, or restore to a raw image.", EXIT_SYSTEM
        ) from None
    except subprocess.CalledProcessError as error:
        raise UserError(
            f"qemu-img cannot make {path}: {error.stderr.decode().strip()}", "Name another place.", EXIT_SYSTEM
        ) from None
    image = Qcow2Image(libnbd.NBD(), path)
    try:
        yield image
        image.flush()
    finally:
        image.close()


def _raising_os_error(call: Callable[[], object]) -> None:
    """libnbd's error is the server's: no space left, most likely."""
    try:
        call()
    except libnbd.Error as error:
        raise OSError(error.errnum or 0, error.string) from error
