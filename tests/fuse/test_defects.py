# SPDX-License-Identifier: LGPL-2.1-or-later
"""An exception that nobody can catch, for C code has called what raised it, is logged and ends the mount."""

from pathlib import Path

import trio

from tests.fuse.support import errno_of, memory_mount
from tests.harness.mount import aside, is_mounted


async def test_an_exception_in_what_c_calls_ends_the_mount(tmp_path: Path) -> None:
    async with memory_mount(tmp_path / "mnt", expected=(1,)) as mount:
        image = mount.image("trap")

        def read() -> None:
            with image.open("rb", buffering=0) as file:
                while file.read(512):
                    file.seek(0)

        assert await aside(errno_of, read)
        with trio.fail_after(10):
            assert await mount.process.wait() == 1
        assert not is_mounted(mount.path)
        assert "a defect in <bound method Trap.spring" in mount.process.log
        assert mount.process.log.count("ZeroDivisionError: a trap") >= 2, "logged, and raised"
