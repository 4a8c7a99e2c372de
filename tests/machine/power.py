# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules: the VM goes off and on, and what happens to its disks meanwhile."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.harness.files import make_random
from tests.machine.base import CHUNK, Base
from tests.machine.world import Image, Slot

NUMBERS = st.integers(0, 1)


class Power(Base):
    """A mount that there is dies with the VM, but for its processes. `qemu-img` may refuse what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[Image, Path]] = []

    @contextlib.contextmanager
    def switched_off(self, *, killed: bool = False) -> Iterator[None]:
        """The VM is off in the block."""
        self.jobs.clear()
        if self.mounted:
            self.mounted.gone = True
        self.world.stop(killed=killed)
        if self.mounted:
            self.end()
        yield
        self.world.start()
        self.dead = False

    @rule(killed=st.booleans())
    def restart(self, killed: bool) -> None:
        with self.switched_off(killed=killed):
            pass

    @rule()
    def swap(self) -> None:
        """Each disk comes back in the place of the other, and so under its name."""
        with self.switched_off():
            one, other = self.world.slots
            one.image, other.image = other.image, one.image

    @rule(number=NUMBERS)
    def copy_image(self, number: int) -> None:
        with self.switched_off():
            image = self.world.slots[number].image
            self.copies.append((image, self.world.copy_image(image)))

    @rule(which=st.integers(0, 9), number=NUMBERS)
    @precondition(lambda self: self.copies)
    def bring_back(self, which: int, number: int) -> None:
        """An older state of an image, of whichever disk that has it now; else of one of them."""
        image, copy = self.copies[which % len(self.copies)]
        with self.switched_off():
            self.world.replace_image(image, copy)
            slots = [slot for slot in self.world.slots if slot.image.folder == image.folder]
            (slots or [self.world.slots[number]])[0].image = image

    @rule(number=NUMBERS)
    def clone(self, number: int) -> None:
        """The disk goes on with a copy of its image, bitmaps and all, and the other disk gets the image itself."""
        with self.switched_off():
            source, other = self.world.slots[number], self.world.slots[1 - number]
            if source.image.top == "base":
                other.image = source.image
                image = self.world.new_folder(source.image.format)
                image.path.write_bytes(other.image.path.read_bytes())
                source.image = image

    @rule(number=NUMBERS, chunks=st.integers(4, 48))
    def resize_offline(self, number: int, chunks: int) -> None:
        with self.switched_off():
            image = self.world.slots[number].image
            self.tried("resize", "-q", "--shrink", "-f", image.format, image.path, str(chunks * CHUNK))

    @rule(number=NUMBERS)
    def overlay_offline(self, number: int) -> None:
        with self.switched_off():
            slot = self.world.slots[number]
            overlay = replace(slot.image, top=f"overlay{self.world.number()}", format="qcow2")
            backing = ("-b", slot.image.path, "-F", slot.image.format)
            if self.tried("create", "-q", "-f", "qcow2", *backing, overlay.path):
                slot.image = overlay

    @rule(number=NUMBERS)
    def commit_offline(self, number: int) -> None:
        """All that is in overlays goes down into the first image."""
        with self.switched_off():
            slot = self.world.slots[number]
            base = replace(slot.image, top="base", format=slot.image.base)
            if slot.image.top != "base" and self.tried("commit", "-q", "-b", base.path, slot.image.path):
                slot.image = base

    @rule(number=NUMBERS)
    def rebase_offline(self, number: int) -> None:
        """The overlay takes all that is below it."""
        with self.switched_off():
            slot = self.world.slots[number]
            if slot.image.top != "base":
                self.tried("rebase", "-q", "-b", "", slot.image.path)

    @rule(number=NUMBERS, words=st.sampled_from(["-c", "-a"]))
    def internal_snapshot(self, number: int, words: str) -> None:
        with self.switched_off():
            self.tried("snapshot", "-q", words, "one", self.world.slots[number].image.path)

    @rule(number=NUMBERS)
    def overwrite_offline(self, number: int) -> None:
        """Somebody restores a disk into the image that there is."""
        with self.switched_off():
            slot = self.world.slots[number]
            size = self.virtual_size(slot)
            content = make_random(self.folder / "content", size, seed=self.world.number(), hole_every=3)
            self.tried("convert", "-n", "-f", "raw", "-O", slot.image.format, content, slot.image.path)

    def virtual_size(self, slot: Slot) -> int:
        """In bytes."""
        told = self.world.img("info", "--output=json", "-f", slot.image.format, slot.image.path)
        return int(told.split('"virtual-size": ')[1].split(",")[0])

    def tried(self, *words: str | Path) -> bool:
        """Run qemu-img; whether it did what it was told."""
        try:
            self.world.img(*words)
        except subprocess.CalledProcessError:
            return False
        return True

    @rule()
    @precondition(lambda self: not self.dead)
    def cont(self) -> None:
        """The BIOS runs, and writes to no disk."""
        self.world.qmp("cont")

    @rule()
    @precondition(lambda self: not self.dead)
    def pause(self) -> None:
        self.world.qmp("stop")
