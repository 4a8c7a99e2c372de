# SPDX-License-Identifier: LGPL-2.1-or-later
"""Take a snapshot in a process of its own and say `ready`, to be killed by a test.

python -m tests.vm.killed_mount QMP_SOCKET FOLDER [TARGET]
"""

import sys
from contextlib import AsyncExitStack
from pathlib import Path

import trio

from qfsbackup.contracts import Mounting
from qfsbackup.mount.chain import open_chain
from qfsbackup.options import Options
from qfsbackup.sources.qemu import QemuSource
from qfsbackup.status import Status


async def main() -> None:
    socket, folder = map(Path, sys.argv[1:3])
    async with AsyncExitStack() as stack:
        request = None
        for target in sys.argv[3:]:
            request = (await stack.enter_async_context(open_chain(target, folder, None, in_image=True))).request
        mounting = Mounting(Options(fleece=folder, vm="vm"), folder, Status(), checkpoint=request)
        await stack.enter_async_context(QemuSource(socket).snapshot(mounting))
        print("ready", flush=True)
        await trio.sleep_forever()


if __name__ == "__main__":
    trio.run(main)
