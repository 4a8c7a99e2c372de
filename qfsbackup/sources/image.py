# SPDX-License-Identifier: LGPL-2.1-or-later
"""A disk image that somebody names instead of a VM: our bitmaps are inside, and qemu-img takes them off.

QEMU's image lock refuses it while a VM has the image open.
"""

from __future__ import annotations

import json
import os
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path

from qfsbackup.contracts import Mounting, Snapshot, Source
from qfsbackup.errors import EXIT_SYSTEM, EXIT_USAGE, UserError
from qfsbackup.options import Options

SERVE_IT = (
    "A running VM's disks are read through its QEMU: name that VM's QMP socket. An image that no VM uses can be served"
    " with qemu-nbd --read-only --persistent --socket=/run/disk.nbd, and mounted as nbd+unix:///?socket=/run/disk.nbd"
)
SUFFIXES = (".raw", ".img", ".qcow2", ".qcow", ".vmdk", ".vdi", ".vhdx", ".vhd", ".iso")
QCOW2_MAGIC = b"QFI\xfb"


class ImageSource(Source):
    """A file, or a block device."""

    kind = "a disk image"

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = str(path)
        self.place = os.path.realpath(path)

    def check(self, options: Options) -> None:
        """Whatever the options are, there is no snapshot."""

    def is_there(self) -> bool:
        """It is no VM that may be off."""
        return True

    def snapshot(self, mounting: Mounting) -> AbstractAsyncContextManager[Snapshot]:
        raise self._refusal()

    async def clean_up(self, options: Options) -> list[str]:
        raise self._refusal()

    def _refusal(self) -> UserError:
        if self._path.is_block_device():
            return UserError(f"{self.name} is a block device, not a VM's QMP socket", SERVE_IT)
        if _is_image(self._path):
            return UserError(f"{self.name} is a disk image, not a VM's QMP socket", SERVE_IT)
        return UserError(
            f"{self.name} is a file, not a VM's QMP socket",
            "Is the VM running, and was it started with -qmp unix:PATH,server=on,wait=off?",
        )

    async def checkpoints(self, options: Options) -> list[str]:
        """A line for each of our bitmaps in the image. Raises UserError."""
        found = [f"{target}  {generation}  {name}" for name, target, generation in await self._ours()]
        return found or [f"no target has a bitmap in {self.name}"]

    async def forget(self, options: Options, target: str, *, others: bool) -> list[str]:
        """Take all bitmaps of the target off the image, whoever made them. Raises UserError."""
        ours = await self._ours()
        names = [name for name, of, _ in ours if of == target]
        if not names:
            targets = ", ".join(sorted({of for _, of, _ in ours})) or "none"
            raise UserError(f"no bitmap of target {target} is in {self.name}", f"Targets: {targets}.", EXIT_USAGE)
        for name in names:
            await self._qemu_img("bitmap", "-f", "qcow2", "--remove", self.name, name)
        return [f"removed the bitmap {name} of {self.name}" for name in names]

    async def _ours(self) -> list[tuple[str, str, str]]:
        """Name, target and generation of each bitmap of ours."""
        from qfsbackup.vm.bitmaps.checkpoint import NAME  # needs all the heavy modules

        facts = json.loads(await self._qemu_img("info", "-f", "qcow2", "--output=json", self.name))
        bitmaps = facts["format-specific"]["data"].get("bitmaps", ())
        matches = [NAME.fullmatch(bitmap["name"]) for bitmap in bitmaps]
        return [(match[0], match["target"], match["generation"]) for match in matches if match]

    async def _qemu_img(self, *words: str) -> str:
        import trio  # the supervisor must not have it

        try:
            done = await trio.run_process(["qemu-img", *words], capture_stdout=True, capture_stderr=True, check=False)
        except FileNotFoundError:
            hint = "It comes with QEMU (Debian: qemu-utils)."
            raise UserError("qemu-img is not installed", hint, EXIT_SYSTEM) from None
        if done.returncode == 0:
            return done.stdout.decode()
        said = " ".join(done.stderr.decode(errors="replace").split()).removeprefix("qemu-img: ")
        if " lock" in said:
            hint = "While its VM runs, name its QMP socket instead."
            raise UserError(f"{self.name} is in use: {said}", hint, EXIT_SYSTEM)
        raise UserError(
            f"{self.name} cannot be looked into: {said}",
            "Name a VM's QMP socket, or the qcow2 image of a VM that is off: no other format holds bitmaps.",
            EXIT_USAGE,
        )


def source(text: str) -> ImageSource:
    """The image at this path."""
    return ImageSource(Path(text).absolute())


def _is_image(path: Path) -> bool:
    if path.suffix.lower() in SUFFIXES:
        return True
    with suppress(OSError), path.open("rb") as file:
        return file.read(len(QCOW2_MAGIC)) == QCOW2_MAGIC
    return False
