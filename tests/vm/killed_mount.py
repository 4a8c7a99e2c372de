# SPDX-License-Identifier: LGPL-2.1-or-later
"""Take a snapshot in a process of its own and say `ready`, to be killed by a test.

python -m tests.vm.killed_mount QMP_SOCKET FOLDER
"""

import sys
from pathlib import Path

import trio

from qfsbackup.sources.qemu import QemuSource
from qfsbackup.status import Status


async def main() -> None:
    socket, folder = map(Path, sys.argv[1:])
    source = QemuSource(socket=socket, runtime=folder, fleece=folder, status=Status())
    async with source.snapshot():
        print("ready", flush=True)
        await trio.sleep_forever()


if __name__ == "__main__":
    trio.run(main)
