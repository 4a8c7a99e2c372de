# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rows that read an image: in sequence, at random, sparsely."""

import json
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

import trio

from .contenders import Contender, all_mounted, uri
from .measure import Action, Outcome, measure
from .rows import NBDCOPY, Samples
from .scale import MIB, Scale
from .stage import Stage

# What nbdcopy is tried with; its best counts. More in flight than 4 MiB is slower: it leaves the processor's cache.
COPIES = (
    ["-C2"],
    ["-C4", "--no-extents"],
    ["-C1", "--request-size=524288", "-R4"],
    ["-C2", "--request-size=524288", "-R4"],
    ["-C2", "--request-size=1048576", "-R4"],
)


async def measure_reading(stage: Stage, rows: Collection[str], samples: Samples) -> None:
    """Round by round, row by row, contender by contender."""
    async with all_mounted(stage) as contenders:
        copies = _copies(stage)
        for _ in range(stage.scale.rounds):
            for row in rows:
                for contender in contenders:
                    action = _action(row, contender, stage)
                    samples.add(row, contender.name, await measure(action, contender.own, stage.vm.pid))
                for name, action in copies.items() if row == "sequential-1m" else ():
                    samples.add(row, name, await measure(action, [], stage.vm.pid))


READING = ("sequential-1m", "sequential-128k", "parallel-2", "parallel-4", "random-1", "random-4", "sparse-copy")


def _action(row: str, contender: Contender, stage: Stage) -> Action:
    scale, full, sparse = stage.scale, contender.images["full"], contender.images["sparse"]
    actions: dict[str, Action] = {
        "sequential-1m": partial(_sequential, full, scale.full, scale.full, 1, "1M"),
        "sequential-128k": partial(_sequential, full, scale.full, scale.full, 1, "128K"),
        "parallel-2": partial(_sequential, full, scale.full, scale.parallel, 2, "1M"),
        "parallel-4": partial(_sequential, full, scale.full, scale.parallel, 4, "1M"),
        "random-1": partial(_random, full, 1, scale.random_seconds),
        "random-4": partial(_random, full, 4, scale.random_seconds),
        "sparse-copy": partial(_sparse_copy, sparse, stage.directory / "copy.raw", scale),
    }
    return actions[row]


async def _sequential(image: Path, whole: int, size: int, readers: int, block: str) -> Outcome:
    """`size` bytes of an image of `whole`, each reader its share, as far from each other as there is room for."""
    distance, share = whole // readers, size // readers
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for number in range(readers):
            nursery.start_soon(_dd, image, block, number * distance, share)
    return Outcome(size / MIB / (trio.current_time() - start), size)


async def _dd(image: Path, block: str, start: int, size: int) -> None:
    words = ["dd", f"if={image}", "of=/dev/null", f"bs={block}", "iflag=count_bytes,skip_bytes,fullblock"]
    done = await trio.run_process([*words, f"skip={start}", f"count={size}"], capture_stderr=True)
    if f"{size} bytes".encode() not in done.stderr:
        raise RuntimeError(f"dd did not read {size} bytes of {image}: {done.stderr.decode()}")


async def _random(image: Path, readers: int, seconds: float) -> Outcome:
    words = ["fio", "--name=random", f"--filename={image}", "--readonly", "--rw=randread", "--bs=4k"]
    words += ["--ioengine=psync", f"--numjobs={readers}", "--group_reporting", "--norandommap", "--randrepeat=0"]
    words += ["--time_based", f"--runtime={round(seconds * 1000)}ms", "--output-format=json"]
    done = await trio.run_process(words, capture_stdout=True)
    read = json.loads(done.stdout)["jobs"][0]["read"]
    return Outcome(read["iops"], read["io_bytes"])


async def _sparse_copy(image: Path, copy: Path, scale: Scale) -> Outcome:
    start = trio.current_time()
    try:
        await trio.run_process(["cp", "--sparse=auto", image, copy])
        return Outcome(trio.current_time() - start, scale.sparse)
    finally:
        copy.unlink()  # noqa: ASYNC240 - in memory


def _copies(stage: Stage) -> dict[str, Action]:
    """nbdcopy in its settings."""
    source = uri(stage, "full")
    return {
        " ".join([NBDCOPY, *setting]): partial(_copy, ["nbdcopy", *setting, source, "null:"], stage.scale.full)
        for setting in COPIES
    }


async def _copy(words: Sequence[str], size: int) -> Outcome:
    start = trio.current_time()
    await trio.run_process(words)
    return Outcome(size / MIB / (trio.current_time() - start), size)
