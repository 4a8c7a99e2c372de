# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m tests.bench`: choose the rows, measure them, print the table."""

import argparse
import json
import shutil
import signal
import tempfile
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import trio

from .guest import GUEST, measure_guest
from .listing import measure_listing
from .machine import describe
from .mounting import MOUNTING, measure_mounting
from .reading import READING, measure_reading
from .restic import RESTIC, measure_restic
from .rows import ROWS, Samples
from .scale import GIB, SHORT, Scale
from .stage import staged
from .table import as_json, as_text

MEMORY = Path("/dev/shm")


def main() -> None:
    arguments = _arguments()
    scale = _scale(arguments)
    directory = _room(arguments.directory, scale)
    samples = Samples()
    with tempfile.TemporaryDirectory(prefix="qfsbench-", dir=directory) as folder:
        if not trio.run(_until_signal, Path(folder), scale, arguments.only or list(ROWS), samples):
            raise SystemExit("ended by a signal")
        machine = describe(Path(folder))
    print(as_text(machine, scale, samples))
    if arguments.json:
        arguments.json.write_text(json.dumps(as_json(machine, scale, samples), indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run bench", description=__doc__)
    parser.add_argument("--rounds", type=int, help="how often each contender runs (default 5)")
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=list(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--short", action="store_true", help="tiny disks, one round: does it work")
    parser.add_argument("--full", action="store_true", help="the sparse disk has no holes: restic on 8 GiB")
    parser.add_argument("--directory", type=Path, help=f"where the images are made (default {MEMORY} if it has room)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there")
    return parser.parse_args()


def _scale(arguments: argparse.Namespace) -> Scale:
    scale = SHORT if arguments.short else Scale(rounds=5)
    if arguments.full:
        scale = replace(scale, data=scale.sparse)
    return replace(scale, rounds=arguments.rounds or scale.rounds)


def _room(chosen: Path | None, scale: Scale) -> Path:
    """Where there is room for the images, and as much again in memory for what runs."""
    directory = chosen or (MEMORY if _free(MEMORY) > scale.space + 2 * GIB else Path(tempfile.gettempdir()))
    if _free(directory) < scale.space:
        raise SystemExit(f"{directory} has no room for {scale.space >> 20} MiB\nName another one: --directory DIR")
    return directory


def _free(directory: Path) -> int:
    return shutil.disk_usage(directory).free


async def _until_signal(directory: Path, scale: Scale, rows: Collection[str], samples: Samples) -> bool:
    """Measure; a signal ends it in order, with all that was mounted unmounted, and the result is False."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(wait)
            await _measure(directory, scale, rows, samples)
            nursery.cancel_scope.cancel()
            return True
    return False


async def _measure(directory: Path, scale: Scale, rows: Collection[str], samples: Samples) -> None:
    reading = [row for row in READING if row in rows]
    if reading or not {*RESTIC, *MOUNTING, "listing"}.isdisjoint(rows):
        async with staged(directory, scale) as stage:
            if reading:
                await measure_reading(stage, reading, samples)
            if not set(MOUNTING).isdisjoint(rows):
                await measure_mounting(stage, samples)
            if "listing" in rows:
                await measure_listing(stage, samples)
            if not set(RESTIC).isdisjoint(rows):
                await measure_restic(stage, samples)
    if not set(GUEST).isdisjoint(rows):
        await measure_guest(directory, scale, samples)


if __name__ == "__main__":
    main()
