# SPDX-License-Identifier: LGPL-2.1-or-later
"""The row of listing: all chunks of a disk with their size and time, against plain files on ext4.

The disk `full` in the smallest chunks there are; a disk of 4 GiB has then as many as any disk may have.
"""

import contextlib
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import trio

from tests.harness.mount import aside, taken_away

from .contenders import US, ours
from .measure import Outcome, measure
from .rows import EXT4, Samples
from .stage import Stage

CHUNK = 64 * 1024


async def measure_listing(stage: Stage, samples: Samples) -> None:
    """Round by round, ours and ext4 in turn."""
    async with stage.mounted("disks=full", f"chunk={CHUNK}") as mount:
        chunks, own = mount.path / "chunks/full", (await ours(mount)).own
        async with _ext4(stage.directory) as plain:
            await aside(_same_tree, chunks, plain, CHUNK)
            count = stage.scale.full // CHUNK
            for _ in range(stage.scale.rounds):
                samples.add("listing", US, await measure(partial(_list, chunks, count), own, stage.vm.pid))
                samples.add("listing", EXT4, await measure(partial(_list, plain, count), [], stage.vm.pid))


@contextlib.asynccontextmanager
async def _ext4(directory: Path) -> AsyncIterator[Path]:
    """A new and empty ext4."""
    image, mountpoint = directory / "ext4.raw", directory / "ext4"
    mountpoint.mkdir()
    await trio.run_process(["mkfs.ext4", "-q", "-N", "80000", image, "256M"], capture_stdout=True)
    async with taken_away(mountpoint):
        await trio.run_process(["mount", "-o", "loop", image, mountpoint])
        yield mountpoint
    image.unlink()


def _same_tree(source: Path, copy: Path, size: int) -> None:
    """Folders and files of the same names and sizes."""
    for folder in source.iterdir():
        (copy / folder.name).mkdir()
        for file in folder.iterdir():
            with (copy / folder.name / file.name).open("wb") as made:
                made.truncate(size)


async def _list(tree: Path, count: int) -> Outcome:
    start = trio.current_time()
    words: list[str | Path] = ["find", tree, "-type", "f", "-printf", "%s %T@ %i\n"]
    done = await trio.run_process(words, capture_stdout=True)
    found = done.stdout.count(b"\n")
    if found != count:
        raise RuntimeError(f"{tree} has {found} files instead of {count}")
    return Outcome(trio.current_time() - start, 0)
