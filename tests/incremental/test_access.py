# SPDX-License-Identifier: LGPL-2.1-or-later
"""access=dirty and discard=release save fleecing space and never make data up; fleece-limit= ends the snapshot only."""

import errno
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from tests.harness.files import assert_same
from tests.harness.mount import Mount, aside, qfsbackup
from tests.harness.qemu import Qemu
from tests.incremental.support import CHUNK, CHUNKS, DISKS, bed, bitmap_of, chunk_names
from tests.incremental.tools import Borg, Restic, Rsync, Tool
from tests.vm.support import guest_io

SAVING = "access=dirty,discard=release"


async def fleecing(mount: Mount) -> int:
    """What vda's fleecing file holds."""
    used: int = (await mount.fresh_status())["disks"]["vda"]["fleecing_used"]
    return used


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait for what nobody tells: the kernel closes a file of the mount after close(2) has returned."""
    with trio.fail_after(20):
        while not await condition():  # noqa: ASYNC110 - as above
            await trio.sleep(0.01)


async def unreadable(path: Path) -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is looked at
        await aside(path.read_bytes)
    assert caught.value.errno == errno.EIO


async def test_a_release_gives_fleecing_space_back_and_is_never_read_as_zeros(qemu: Qemu, tmp_path: Path) -> None:
    async with bed(qemu, tmp_path) as lab:
        await lab.committed("nas")
        await guest_io(lab.vm, "vda", f"write -P 1 0 {8 * CHUNK}")
        before = (await aside((await lab.disk("vda", tmp_path / "before")).read_bytes))[: 8 * CHUNK]
        async with lab.mounted("nas", SAVING) as mount:
            paths = [mount.path / name for name in chunk_names("vda", range(CHUNKS))]
            assert "images" not in await aside(lambda: [path.name for path in mount.path.iterdir()])
            await unreadable(paths[10])
            await guest_io(lab.vm, "vda", f"write -P 2 {8 * CHUNK} {8 * CHUNK}")
            assert await fleecing(mount) == 0  # a guest write outside the dirty chunks
            await guest_io(lab.vm, "vda", f"write -P 2 0 {8 * CHUNK}")
            assert await fleecing(mount) == 8 * CHUNK
            for number, path in enumerate(paths[:8]):
                left = (7 - number) * CHUNK
                assert await aside(path.read_bytes) == before[number * CHUNK : (number + 1) * CHUNK]
                await until(lambda left=left: _is(mount, left))  # type: ignore[misc]
                await unreadable(path)
            assert (await mount.status())["state"] == "ready"
            await guest_io(lab.vm, "vda", f"write -P 3 0 {4 * CHUNK}")
            assert await fleecing(mount) == 0
            await lab.commit()
        assert bitmap_of(await lab.committed("nas")) == dict.fromkeys(DISKS, "reuse")


async def _is(mount: Mount, used: int) -> bool:
    return await fleecing(mount) == used


@pytest.mark.one_qemu
@pytest.mark.parametrize("kind", [Restic, Borg, Rsync])
async def test_tools_back_up_what_is_dirty_and_never_miss_the_rest(
    qemu: Qemu, tmp_path: Path, kind: Callable[[Path], Tool]
) -> None:
    tool = kind(tmp_path)
    async with bed(qemu, tmp_path) as lab:
        await tool.setup()
        await lab.backup(tool, SAVING)
        await guest_io(lab.vm, "vda", f"write -P 1 {3 * CHUNK + 512} 512")
        second = await lab.backup(tool, SAVING)
        assert tool.read(second.log) == set(chunk_names("vda", [3])), second.log
        folder = await tool.restore(tmp_path / "restored")
        for disk in DISKS:
            done = await qfsbackup("restore", folder / "chunks" / disk, tmp_path / f"{disk}.raw")
            assert done.code == 0, done
            await aside(assert_same, tmp_path / f"{disk}.raw", await lab.disk(disk, tmp_path / "now"))


async def test_a_full_fleecing_file_breaks_the_backup_and_not_the_guest(qemu: Qemu, tmp_path: Path) -> None:
    async with bed(qemu, tmp_path) as lab:
        await lab.committed("nas")
        before = await lab.checkpoints()
        script = (
            'echo ready > ../started; until grep -q \'"state": "broken"\' .qfsbackup/status.json; do sleep 0.05; done'
        )
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                done = await lab.run("nas", script, "fleece-limit=256k", code=125)
                assert "fleece-limit=262144" in done.stderr, done
                assert "not committed" in done.stderr, done
                assert "Traceback" not in done.stderr, done

            nursery.start_soon(run)
            await until(lambda: aside((tmp_path / "started").exists))
            await guest_io(lab.vm, "vda", "write -P 5 0 1M")
        await guest_io(lab.vm, "vda", "write -P 6 512k 1M")
        await guest_io(lab.vm, "vda", "read -P 5 0 512k")
        await guest_io(lab.vm, "vda", "read -P 6 512k 1M")
        after = await lab.checkpoints()
        assert [line.split()[:3] for line in after] == [line.split()[:3] for line in before]
        assert bitmap_of(await lab.committed("nas")) == dict.fromkeys(DISKS, "reuse")
