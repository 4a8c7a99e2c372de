# SPDX-License-Identifier: LGPL-2.1-or-later
"""How the mount looks from outside: its names, its owner, its readers."""

import os
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from qfsbackup.backup.names import file_name
from tests.fuse.serve import HOSTILE, MIB, content, reads_pipe
from tests.fuse.support import PUNCH_HOLE, fallocate, memory_mount
from tests.harness.mount import Mount, Result, as_user, aside, command, ending, start, taken_away

USER, OTHER, GROUP = 41234, 41235, 41236


@pytest.fixture
async def mount(tmp_path: Path) -> AsyncIterator[Mount]:
    async with memory_mount(tmp_path / "mnt") as mount:
        yield mount


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A folder that every user can enter (pytest's own are root's)."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="qfsbackup-test-") as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


async def test_the_service_folder_is_found_but_never_listed(mount: Mount) -> None:
    assert sorted(await aside(os.listdir, mount.path)) == ["chunks", "config", "delta", "images", "maps", "vm.json"]
    assert await aside(os.listdir, mount.path / ".qfsbackup") == ["status.json"]
    assert (await mount.status())["state"] == "ready"


async def test_names_that_no_file_may_have_become_some_that_it_may(mount: Mount) -> None:
    def check() -> None:
        listed = {path.name for path in (mount.path / "images").iterdir()}
        expected = {name: f"{file_name(name)}.raw" for name in HOSTILE}
        assert set(expected.values()) <= listed
        assert len(set(expected.values())) == len(HOSTILE)
        for name, file in expected.items():
            assert (mount.path / "images" / file).read_bytes() == name.encode(errors="surrogatepass")
        assert (mount.path / "config" / file_name("../evil")).read_bytes() == b"config"
        assert not any("/" in file or "\n" in file for file in listed)

    await aside(check)


async def test_a_source_with_commas_and_backslashes_is_shown_as_it_is(mount: Mount) -> None:
    listed = await command("findmnt", "-n", "-o", "SOURCE,FSTYPE", "--mountpoint", mount.path)
    assert listed.stdout.split() == ["memory,", "with", "\\", "a", "comma", "fuse.qfsbackup"]


async def read_as(user: int, path: Path, group: int | None = None) -> Result:
    line = as_user(user, "sha256sum", path)
    if group is not None:
        line = [f"--regid={group}" if str(word).startswith("--regid") else word for word in line]
    return await command(*line)


async def test_nobody_but_root_enters(open_path: Path) -> None:
    async with memory_mount(open_path / "mnt") as mount:
        image = mount.image("even")
        assert (await command("sha256sum", image)).code == 0
        refused = await read_as(USER, image)
        assert (refused.code, "Permission denied" in refused.stderr) == (1, True)
        mode = await command("stat", "-c", "%a %u %g", mount.path, image, mount.path / "vm.json")
        assert mode.stdout.splitlines() == ["500 0 0", "600 0 0", "400 0 0"]


async def test_an_owner_that_was_named_enters_and_others_do_not(open_path: Path) -> None:
    async with memory_mount(open_path / "mnt", USER, 0) as mount:
        image = mount.image("even")
        assert (await read_as(USER, image)).code == 0
        assert (await read_as(OTHER, image)).code == 1
        punched = await command(*as_user(USER, "fallocate", "-p", "-o", "0", "-l", "65536", image))
        assert punched.code == 0, punched.stderr
        assert (await command(*as_user(OTHER, "fallocate", "-p", "-o", "0", "-l", "65536", image))).code != 0


async def test_a_group_and_a_mode_that_were_named_let_its_members_read(open_path: Path) -> None:
    async with memory_mount(open_path / "mnt", 0, GROUP, "440") as mount:
        image = mount.image("even")
        assert (await read_as(USER, image, GROUP)).code == 0
        assert (await read_as(USER, image)).code == 1
        line = [word.replace("regid=41234", f"regid={GROUP}") for word in map(str, as_user(USER))]
        assert (await command(*line, "fallocate", "-p", "-o", "0", "-l", "65536", image)).code != 0
        mode = await command("stat", "-c", "%a %u %g", mount.path, image)
        assert mode.stdout.splitlines() == [f"550 0 {GROUP}", f"440 0 {GROUP}"]


async def test_readers_are_served_at_the_same_time(mount: Mount) -> None:
    """The disk `pair` answers a read only while another one waits."""
    results = list[bytes]()

    async def read() -> None:
        results.append(await aside(mount.image("pair").read_bytes))

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            nursery.start_soon(read)
    assert results == [content(MIB)] * 2


async def test_a_reader_that_is_killed_leaves_the_mount_answering(mount: Mount) -> None:
    """The kernel lets a killed reader go when its read is answered (fs/fuse/dev.c, request_wait_answer)."""
    slow, even = mount.image("slow"), mount.image("even")
    async with taken_away(mount.path):
        reader = start("dd", f"if={slow}", "bs=1M", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with reads_pipe(mount.path).open("rb", buffering=0) as pipe:
            assert await aside(pipe.read, 1) == b"r"
        async with ending(reader.pid):
            reader.kill()
            assert await aside(even.read_bytes) == content(MIB)
            await aside(fallocate, slow, PUNCH_HOLE, MIB - 65536, 65536)
        assert reader.wait() == -signal.SIGKILL
        assert await aside(even.read_bytes) == content(MIB)


async def test_a_lazy_unmount_ends_a_reader_with_an_error_and_the_process_in_order(mount: Mount) -> None:
    async with taken_away(mount.path):
        reader = start("dd", f"if={mount.image('slow')}", "bs=1M", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with reads_pipe(mount.path).open("rb", buffering=0) as pipe:
            assert await aside(pipe.read, 1) == b"r"
        async with ending(reader.pid):
            assert (await command("umount", "-l", mount.path)).code == 0
        assert reader.wait() == 1
        with trio.fail_after(20):
            assert await mount.process.wait() == 0


@pytest.mark.parametrize("direct", ["off", "on"])
async def test_a_loop_device_reads_right(mount: Mount, direct: str) -> None:
    made = await command("losetup", "-r", "-f", "--show", f"--direct-io={direct}", mount.image("even"))
    if made.code != 0:
        pytest.skip(f"this machine offers no loop device: {made.stderr.strip()}")
    device = Path(made.stdout.strip())
    try:
        assert await aside(device.read_bytes) == content(MIB)
    finally:
        await command("losetup", "-d", device)
