# SPDX-License-Identifier: LGPL-2.1-or-later
"""`qfsbackup restore`: chunks, as any backup tool restored them, become a raw or qcow2 image, sparse.

The image appears under its name only when it is whole. A block device is written in place, zeros too, for nobody knows
what it held before.
"""

from __future__ import annotations

import errno
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from qfsbackup.backup.chunk_set import ChunkSet, check_one_backup, find_chunks
from qfsbackup.backup.described import HINT
from qfsbackup.errors import EXIT_SYSTEM, EXIT_USAGE, UserError
from qfsbackup.facts import CLUSTER
from qfsbackup.progress import bytes_done
from qfsbackup.restore.in_use import check_unused
from qfsbackup.restore.output import Format, cannot_write, check_output, chosen_format
from qfsbackup.restore.qcow2 import qcow2_image
from qfsbackup.sizes import human

log = logging.getLogger(__name__)

PIECE = 1 << 20  # bytes read at once
BLOCK = CLUSTER  # bytes; what is zero is left out by these
ZEROS = bytes(BLOCK)


def restore(
    folder: Path, output: Path, format_: Format | None = None, *, force: bool = False, torn: bool = False
) -> None:
    """Write the disk whose chunks are below `folder` to `output`.

    Without `format_` the name's suffix says it; what is not .qcow2 is raw. `force`: overwrite. `torn`: also where the
    chunks are not of one backup, or not all of it. Raises UserError.
    """
    chunks = find_chunks(folder)
    form = chosen_format(output, format_)
    device = check_output(output, force)
    _check_outside(output, folder)
    if device and form != "raw":
        raise UserError("a block device takes a raw image", "Leave --format out, or name a file.", EXIT_USAGE)
    check_one_backup(chunks, torn=torn)
    try:
        with _image(output, form, chunks.size, device=device, force=force) as image:
            _copy(chunks, image, zeros=device)
    except OSError as error:
        raise cannot_write(output, error) from None
    log.info("restored %s to %s", human(chunks.size), output)


def _check_outside(output: Path, folder: Path) -> None:
    """Nobody's backup is overwritten by what comes out of it."""
    if output.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{output} is among the chunks", "Name another place.", EXIT_USAGE)


class Image(Protocol):
    """What is written to."""

    def write(self, offset: int, content: bytes) -> None:
        """Raises OSError."""
        ...


@contextmanager
def _image(output: Path, form: Format, size: int, *, device: bool, force: bool) -> Iterator[Image]:
    """The image at `output`, on the disk when the block ends. Raises UserError, OSError."""
    if device:
        with _device(output, size) as image:
            yield image
        return
    with _new_name(output, force) as path, (qcow2_image if form == "qcow2" else _raw_image)(path, size) as image:
        yield image


@contextmanager
def _new_name(output: Path, force: bool) -> Iterator[Path]:
    """A file that gets its name when the block ends well, and is gone where it does not."""
    output = output.resolve()
    descriptor, name = tempfile.mkstemp(prefix=f".{output.name[:100]}.", suffix=".partial", dir=output.parent)
    os.close(descriptor)
    try:
        yield Path(name)
        check_output(output, force)  # it may have come meanwhile, or into use
        Path(name).replace(output)
    except BaseException:
        Path(name).unlink()
        raise
    folder = os.open(output.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def _raw_image(path: Path, size: int) -> Iterator[RawImage]:
    with path.open("wb", buffering=PIECE) as file:
        file.truncate(size)
        yield RawImage(file)
        _sync(file)


@contextmanager
def _device(path: Path, size: int) -> Iterator[RawImage]:
    """The block device, which must hold `size` bytes and be in use by nobody (O_EXCL, open(2)). Not all say so."""
    descriptor = os.open(path, os.O_WRONLY | os.O_EXCL | os.O_CLOEXEC)
    with os.fdopen(descriptor, "wb", buffering=PIECE) as file:
        check_unused(path)
        room = file.seek(0, os.SEEK_END)
        if room < size:
            raise UserError(f"{path} has {room} bytes, the disk {size}", "Take a larger device.", EXIT_SYSTEM)
        yield RawImage(file)
        _sync(file)


class RawImage:
    """A raw image."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, offset: int, content: bytes) -> None:
        self._file.seek(offset)
        self._file.write(content)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _copy(chunks: ChunkSet, image: Image, *, zeros: bool) -> None:
    """`zeros`: write them too."""
    with bytes_done("restored", chunks.size) as show:
        for number, path in enumerate(chunks.paths()):
            start = number * chunks.chunk
            size = min(chunks.chunk, chunks.size - start)
            for offset, block in _blocks(path, size, chunks.times[number], zeros=zeros):
                image.write(start + offset, block)
            show(min(start + chunks.chunk, chunks.size))


def _blocks(path: Path, size: int, time: int, *, zeros: bool) -> Iterator[tuple[int, bytes]]:
    """Offset and content of each block of a chunk; without `zeros`, only of those which are not all zero.

    Raises UserError where it is not, or not any more, the file with this modification time that was looked at.
    """
    try:
        with path.open("rb", buffering=0) as file:
            position = 0 if zeros else _next_data(file.fileno(), 0, size)
            while position < size:
                content = os.pread(file.fileno(), PIECE, position)
                if len(content) < min(PIECE, size - position):
                    raise _changed(path)
                for offset in range(0, len(content), BLOCK):
                    block = content[offset : offset + BLOCK]
                    if zeros or block != ZEROS[: len(block)]:
                        yield position + offset, block
                position += len(content)
                if not zeros:
                    position = _next_data(file.fileno(), position, size)
            if os.fstat(file.fileno()).st_mtime_ns != time:
                raise _changed(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", HINT, EXIT_SYSTEM) from None


def _changed(path: Path) -> UserError:
    return UserError(f"{path} was changed meanwhile", "Let the tool that does so end, and restore again.", EXIT_SYSTEM)


def _next_data(descriptor: int, position: int, size: int) -> int:
    """The start of the block in which the next data is; `size` where there is none."""
    try:
        return max(os.lseek(descriptor, position, os.SEEK_DATA) // BLOCK * BLOCK, position)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return size
