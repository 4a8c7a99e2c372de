# SPDX-License-Identifier: LGPL-2.1-or-later
"""Mount namespaces that are made during a mount copy it; such a copy must not keep the mount, and the VM's filters."""

import subprocess
from pathlib import Path

import trio

from tests.fuse.support import memory_mount
from tests.harness.mount import command


async def test_a_copy_of_the_mount_in_another_namespace_does_not_keep_it_alive(tmp_path: Path) -> None:
    holder = ("unshare", "--mount", "--propagation", "private", "sh", "-c", "echo copied; exec sleep 600")
    async with memory_mount(tmp_path) as mount:
        copy = await trio.lowlevel.open_process(holder, stdout=subprocess.PIPE)
        assert copy.stdout is not None
        async with copy.stdout as output:
            try:
                assert await output.receive_some() == b"copied\n"
                assert (await command("umount", tmp_path)).code == 0
                with trio.fail_after(20):
                    await mount.process.wait()
            finally:
                copy.kill()
                with trio.CancelScope(shield=True):
                    await copy.wait()
