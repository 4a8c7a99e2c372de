# SPDX-License-Identifier: LGPL-2.1-or-later
"""No read is larger than 1 MiB, however much is read: QEMU holds guest writes to a range up while it is read."""

import re
from pathlib import Path

from qfsbackup.contracts import awaited
from tests.harness.disk import MIB
from tests.harness.nbd_server import nbdkit
from tests.nbd.disks import opened

SIZE = 1100 * MIB


async def test_no_read_is_larger_than_promised(tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = ["--filter=log", "pattern", str(SIZE), f"logfile={log}"]
    async with nbdkit(tmp_path, words) as server, opened(server.uri, SIZE) as (disk, counters):
        for offset in range(0, SIZE, MIB):
            content = await awaited(disk.read, offset, MIB)
            assert int.from_bytes(content[:8]) == offset  # nbdkit-pattern-plugin(1)
        assert counters.nbd_bytes == SIZE
    lengths = [int(length, 16) for length in re.findall(r" Read id=.* count=0x([0-9a-f]+) ", log.read_text())]
    assert sum(lengths) == SIZE
    assert max(lengths) <= MIB
