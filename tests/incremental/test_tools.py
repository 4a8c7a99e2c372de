# SPDX-License-Identifier: LGPL-2.1-or-later
"""restic, borg and rsync read what changed and nothing else, by their own account, and restore the disk."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qfsbackup.state.store import open_store
from tests.harness.files import assert_same
from tests.harness.mount import aside, qfsbackup
from tests.harness.qemu import Qemu
from tests.harness.vm import UUID
from tests.incremental.support import CHUNK, DISKS, Bed, all_chunks, bed, chunk_names
from tests.incremental.tools import Borg, Restic, Rsync, Tool, all_tools
from tests.vm.support import guest_io


async def assert_restored(lab: Bed, tool: Tool, name: str = "restored") -> None:
    """What the tool gives back is the disks as they are now."""
    folder = await tool.restore(lab.folder / f"{tool.name}.{name}")
    for disk in DISKS:
        image, now = lab.folder / f"{tool.name}.{name}.{disk}.raw", lab.folder / f"{disk}.now"
        done = await qfsbackup("restore", folder / "chunks" / disk, image, "--force")
        assert (done.code, "cannot be known" in done.stderr) == (0, False), done
        await aside(assert_same, image, await lab.disk(disk, now))


async def test_the_second_backup_reads_what_changed_and_a_third_nothing(qemu: Qemu, tmp_path: Path) -> None:
    async with bed(qemu, tmp_path) as lab:
        tools = all_tools(tmp_path)
        for tool in tools:
            await tool.setup()
            first = await lab.backup(tool)
            assert first.bitmaps() == {"vda": "new", "vdb": "new"}
            assert tool.read(first.log) == all_chunks(), first.log
        await guest_io(lab.vm, "vda", "write -P 1 200k 1k")  # inside of chunk 3
        await guest_io(lab.vm, "vda", f"write -P 2 {8 * CHUNK - 512} 1k")  # over the edge of 7 and 8
        await guest_io(lab.vm, "vdb", f"discard {4 * CHUNK} {CHUNK}")
        expected = {*chunk_names("vda", [3, 7, 8]), *chunk_names("vdb", [4])}
        for tool in tools:
            second = await lab.backup(tool)
            assert second.bitmaps() == {"vda": "reuse", "vdb": "reuse"}
            assert tool.read(second.log) == expected, second.log
            assert tool.skipped(second.log) == all_chunks() - expected, second.log
            second.check_nbd_bytes(len(expected))
            await assert_restored(lab, tool)
            third = await lab.backup(tool)
            again = expected if tool.name == "borg" else set()  # borg may read again what is younger than its start
            assert tool.read(third.log) <= again, third.log
            third.check_nbd_bytes(len(tool.read(third.log)))
            if isinstance(tool, Restic):
                summary = tool.summary(third.log)
                assert (summary["files_new"], summary["files_changed"]) == (0, 2), summary  # vm.json, config
                assert summary["files_unmodified"] == len(all_chunks())


@pytest.mark.one_qemu
@pytest.mark.parametrize("kind", [Restic, Borg, Rsync])
async def test_mounts_within_seconds_and_a_clock_set_back_deceive_no_tool(
    qemu: Qemu, tmp_path: Path, kind: Callable[[Path], Tool]
) -> None:
    """What a mount sees of a clock that was set back is a store that has shown later times than now."""
    tool = kind(tmp_path)
    async with bed(qemu, tmp_path) as lab:
        await tool.setup()
        await lab.backup(tool)
        await guest_io(lab.vm, "vda", "write -P 1 0 64k")
        failed = await lab.backup(tool, ending="exit 1", code=1)
        assert tool.read(failed.log) == set(chunk_names("vda", [0]))
        await guest_io(lab.vm, "vda", "write -P 2 0 64k")
        with open_store(tmp_path / "state", UUID, "vm") as store:
            store.begin(tool.name, int(2.1e18))  # in the year 2036: borg 1 knows none after 2038
        for number in range(3, 5):
            later = await lab.backup(tool)
            assert set(chunk_names("vda", [0])) <= tool.read(later.log)
            await assert_restored(lab, tool, f"restored{number}")
            await guest_io(lab.vm, "vda", f"write -P {number} 0 64k")
        if tool.name != "borg":  # borg reads again what is younger than now
            assert tool.read(later.log) == set(chunk_names("vda", [0]))


@pytest.mark.one_qemu
@pytest.mark.parametrize("loss", ["lost", "damaged"])
async def test_without_its_state_a_backup_is_full_and_right(qemu: Qemu, tmp_path: Path, loss: str) -> None:
    async with bed(qemu, tmp_path) as lab:
        tools = all_tools(tmp_path)
        for tool in tools:
            await tool.setup()
            await lab.backup(tool)
        await guest_io(lab.vm, "vda", "write -P 1 200k 1k")
        [store] = (tmp_path / "state").glob("*.sqlite")
        if loss == "lost":
            store.unlink()
        else:
            content = store.read_bytes()
            store.write_bytes(content[:4096] + bytes(len(content) - 4096))
        for tool in tools:
            again = await lab.backup(tool)
            assert again.bitmaps() == {"vda": "new", "vdb": "new"}
            assert tool.read(again.log) == all_chunks(), again.log
            await assert_restored(lab, tool)
