# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rows of mounting and unmounting: the commands as a person types them."""

import trio

from tests.harness.mount import qfsbackup, taken_away

from .contenders import US
from .measure import Action, Outcome, measure
from .rows import Samples
from .stage import Stage

MOUNTING = ("mount", "umount")


async def measure_mounting(stage: Stage, samples: Samples) -> None:
    """Round by round."""
    directory = stage.directory / "mnt"
    directory.mkdir(exist_ok=True)
    mount = _timed(
        "mount", str(stage.vm.qmp), str(directory), "-o", f"fleece={stage.directory},state={stage.directory}"
    )
    umount = _timed("umount", str(directory))
    async with taken_away(directory):
        for _ in range(stage.scale.rounds):
            samples.add("mount", US, await measure(mount, [], stage.vm.pid))
            samples.add("umount", US, await measure(umount, [], stage.vm.pid))


def _timed(*words: str) -> Action:
    async def action() -> Outcome:
        start = trio.current_time()
        result = await qfsbackup(*words)
        if result.code:
            raise RuntimeError(f"qfsbackup {words[0]}: {result.stderr}")
        return Outcome(trio.current_time() - start, 0)

    return action
