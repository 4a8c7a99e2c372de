# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rows of restic: the first backup, the same again, and again with 1 % of the data changed; each in a new mount."""

import contextlib
import os
import random
import shutil
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from pathlib import Path

import trio

from tests.harness.mount import qfsbackup

from .contenders import CHUNKS, NBDFUSE, US, nbdfuse, ours
from .measure import Outcome, measure
from .rows import Samples
from .stage import Stage, data_pieces

TARGET = "bench"
RESTIC = ("restic-first", "restic-unchanged", "restic-changed")


async def measure_restic(stage: Stage, samples: Samples) -> None:
    """Round by round; one repository at a time, it is as large as the disk's data."""
    for _ in range(stage.scale.rounds):
        for name in (US, CHUNKS, NBDFUSE):
            with _repository(stage.directory) as environment:
                await _series(stage, name, environment, samples)


async def _series(stage: Stage, name: str, environment: dict[str, str], samples: Samples) -> None:
    await _restic(environment, "init")
    for row in RESTIC:
        if row == "restic-changed":
            await _change(stage)
        async with _shown(stage, name) as (path, own):
            back_up = partial(_back_up, environment, path, stage.scale.sparse)
            samples.add(row, name, await measure(back_up, own, stage.vm.pid))
    if name == CHUNKS:  # the next round begins anew, as its repository does
        await _run("checkpoints", stage.vm.qmp, "-o", f"state={stage.directory}", "--delete", TARGET)


@contextlib.asynccontextmanager
async def _shown(stage: Stage, name: str) -> AsyncIterator[tuple[Path, Sequence[int]]]:
    """What is to be backed up, in a new mount, and the processes that show it."""
    async with stage.mounted(*([f"target={TARGET}"] if name == CHUNKS else [])) as mount:
        if name == NBDFUSE:
            async with nbdfuse(stage) as contender:
                yield contender.images["sparse"], contender.own
            return
        path = mount.path / "chunks/sparse" if name == CHUNKS else mount.image("sparse")
        yield path, (await ours(mount)).own
        if name == CHUNKS:
            await _run("commit", mount.path)


async def _run(*words: str | Path) -> None:
    result = await qfsbackup(*words)
    if result.code:
        raise RuntimeError(f"qfsbackup {words[0]}: {result.stderr}")


async def _back_up(environment: dict[str, str], path: Path, size: int) -> Outcome:
    start = trio.current_time()
    await _restic(environment, "backup", path)
    return Outcome(trio.current_time() - start, size)


@contextlib.contextmanager
def _repository(directory: Path) -> Iterator[dict[str, str]]:
    folder = directory / "restic"
    folder.mkdir()
    try:
        yield {
            "RESTIC_REPOSITORY": str(folder / "repository"),
            "RESTIC_CACHE_DIR": str(folder / "cache"),
            "RESTIC_PASSWORD": "bench",
        }
    finally:
        shutil.rmtree(folder)


async def _restic(environment: dict[str, str], *words: str | Path) -> None:
    await trio.run_process(["restic", "--quiet", *words], env={**os.environ, **environment})


async def _change(stage: Stage) -> None:
    """Write to 1 % of the sparse disk's data, as a guest would: through its device."""
    pieces = data_pieces(stage.scale)
    for offset in random.sample(pieces, max(1, len(pieces) // 100)):
        write = f"write -P {random.randrange(1, 256)} {offset} {stage.scale.piece}"
        line = f'qemu-io -d /machine/peripheral/sparse/virtio-backend "{write}"'
        answer = await stage.vm.monitor.execute("human-monitor-command", command_line=line)
        if answer:  # QEMU prints what went well on its own standard output
            raise RuntimeError(f"{line}: {answer}")
