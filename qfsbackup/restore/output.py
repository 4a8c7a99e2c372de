# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a restored image goes: may it be written there, and if not, what to do about it."""

from __future__ import annotations

import errno
import stat
from pathlib import Path
from typing import Literal

from qfsbackup.errors import EXIT_SYSTEM, EXIT_USAGE, UserError
from qfsbackup.restore.in_use import check_unused, device_in_use

Format = Literal["raw", "qcow2"]

OTHERS = {".qcow": "qcow", ".qed": "qed", ".vdi": "vdi", ".vhd": "vpc", ".vhdx": "vhdx", ".vmdk": "vmdk"}
PACKED = {".bz2", ".gz", ".lz4", ".ova", ".xz", ".zip", ".zst"}


def chosen_format(output: Path, format_: Format | None) -> Format:
    """What is asked for, else what the name says: .qcow2, or raw. Raises UserError for what we do not write."""
    suffix = output.suffix.lower()
    if format_ is None and suffix in OTHERS | dict.fromkeys(PACKED):
        raw = output.with_suffix(".raw")
        convert = f"convert it: qemu-img convert -f raw -O {OTHERS.get(suffix)} {raw.name} {output.name}"
        then = convert if suffix in OTHERS else "pack that."
        raise UserError(f"restore writes raw and qcow2 images, no {suffix}", f"Restore to {raw} and {then}", EXIT_USAGE)
    return format_ or ("qcow2" if suffix == ".qcow2" else "raw")


def check_output(output: Path, force: bool) -> bool:
    """Is it a block device? Raises UserError where it may not be written to, whoever forces it."""
    try:
        mode = output.stat().st_mode
    except FileNotFoundError:
        return False
    except OSError as error:
        raise cannot_write(output, error) from None
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise UserError(f"{output} is neither a file nor a block device", "Name another place.", EXIT_SYSTEM)
    if not force:
        raise UserError(f"{output} is there already", "Name another place, or overwrite it: --force", EXIT_SYSTEM)
    if stat.S_ISREG(mode):
        check_unused(output)
    return stat.S_ISBLK(mode)


def cannot_write(output: Path, error: OSError) -> UserError:
    """The error for the person."""
    if error.errno == errno.EBUSY:
        return device_in_use(output)
    folder = output.absolute().parent
    if error.errno == errno.ENOENT:
        return UserError(
            f"cannot write {output}: there is no folder {folder}", f"Make it: mkdir -p {folder}", EXIT_SYSTEM
        )
    return UserError(f"cannot write {output}: {error.strerror}", _hint(error.errno, folder), EXIT_SYSTEM)


def _hint(number: int | None, folder: Path) -> str:
    if number in (errno.EACCES, errno.EPERM):
        return f"Run as root, or as somebody who may write to {folder}."
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "Make room, or name another place. An image has its name only once it is whole."
    if number == errno.EFBIG:
        return "Its file system, or the file size limit (ulimit -f), forbids so large a file: name another place."
    return "Name another place."
