# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every Source promises (contracts.py), of each kind with something real behind it."""

import contextlib
import gc
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from qfsbackup import sources
from qfsbackup.contracts import Mounting, Snapshot, Source, awaited
from qfsbackup.errors import EXIT_USAGE, FsError, UserError
from qfsbackup.mount.tree import note
from qfsbackup.options import Options
from qfsbackup.sources import find
from qfsbackup.status import Status
from tests.contracts.source_beds import BEDS, Bed
from tests.harness.disk import MIB
from tests.harness.mount import PROGRAM, Mount, aside, command, mounting

KNOWING = """
import sys
from qfsbackup import sources
from qfsbackup.cli.main import main
sources.TABLE["toy"] = "tests.contracts.toy"
sys.exit(main())
"""
TOY = [sys.executable, "-c", KNOWING]


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line in the table: this is all that a new kind of source is to the rest of the product."""
    monkeypatch.setitem(sources.TABLE, "toy", "tests.contracts.toy")


@pytest.fixture(params=BEDS)
async def bed(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bed]:
    async with BEDS[request.param](tmp_path) as bed:
        yield bed


@pytest.fixture
def options(tmp_path: Path) -> Options:
    """Where a source keeps what it needs, and where there is no state yet."""
    (tmp_path / "state").mkdir(mode=0o700)
    return Options(fleece=tmp_path, state=tmp_path / "state", connections=2)


def mount_of(options: Options, folder: Path) -> Mounting:
    """What a mount says, with a runtime folder of its own."""
    runtime = folder / f"runtime-{len(list(folder.glob('runtime-*')))}"
    runtime.mkdir()
    return Mounting(options, runtime, Status())


async def contents(stack: AsyncExitStack, snapshot: Snapshot, mounting: Mounting) -> dict[str, bytes]:
    """Open all disks, as a mount does, and read them whole."""
    note(mounting.status, snapshot, mounting.options)
    found = {}
    for one in snapshot.disks:
        disk = await stack.enter_async_context(one.open())
        assert disk.size == one.size
        content = bytearray(disk.size)
        for start, end in disk.data:
            for offset in range(start, end, MIB):
                length = min(MIB, end - offset)
                content[offset : offset + length] = await awaited(disk.read, offset, length)
        found[one.name] = bytes(content)
    return found


async def whole(source: Source, options: Options, folder: Path) -> dict[str, bytes]:
    """All that one more snapshot shows."""
    mounting = mount_of(options, folder)
    async with AsyncExitStack() as stack:
        snapshot = await stack.enter_async_context(source.snapshot(mounting))
        return await contents(stack, snapshot, mounting)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


async def closed_to(number: int) -> None:
    """Wait until no more descriptors are open: a handshake that was given up ends in its thread, and tells nobody."""
    with trio.fail_after(10):
        while True:
            if descriptors() <= number:
                return
            gc.collect()  # libvirt closes a connection when nothing refers to it any more
            await trio.sleep(0.01)  # there is no event to wait for


async def test_its_name_is_the_same_from_every_folder_and_finds_it_again(
    bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = find(bed.text)
    again = find(source.name)
    assert (again.name, again.place) == (source.name, source.place)
    if bed.relative:
        monkeypatch.chdir(tmp_path)
        relative = find(bed.relative)
        assert (relative.name, relative.place) == (source.name, source.place)
    await trio.lowlevel.checkpoint()


async def test_a_snapshot_is_the_disks_byte_for_byte_and_leaves_nothing(
    bed: Bed, options: Options, tmp_path: Path
) -> None:
    source, before, open_before = find(bed.text), await bed.held(), descriptors()
    if not bed.contents:
        with pytest.raises(UserError):
            await whole(source, options, tmp_path)
    else:
        for _ in range(2):
            assert await whole(source, options, tmp_path) == bed.contents
    assert await bed.held() == before
    await closed_to(open_before)


async def test_one_that_fails_half_way_leaves_nothing(
    bed: Bed, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, before, open_before = find(bed.text), await bed.held(), descriptors()
    with monkeypatch.context() as patch:
        bed.half_way(patch)
        with pytest.raises(UserError):
            await whole(source, options, tmp_path)
    assert await bed.held() == before
    await closed_to(open_before)


async def test_one_that_vanishes_is_told_and_the_mount_ends_in_order(
    bed: Bed, options: Options, tmp_path: Path
) -> None:
    source, mounting, open_before = find(bed.text), mount_of(options, tmp_path), descriptors()
    if bed.contents:
        async with AsyncExitStack() as stack:
            snapshot = await stack.enter_async_context(source.snapshot(mounting))
            note(mounting.status, snapshot, options)
            disks = [await stack.enter_async_context(one.open()) for one in snapshot.disks]
            bed.vanish()
            for one, disk in zip(snapshot.disks, disks, strict=True):
                with contextlib.suppress(FsError):
                    assert await awaited(disk.read, 0, 512) == bed.contents[one.name][:512]
        await closed_to(open_before)
        assert not source.is_there()
        assert mounting.status.unrestored is None
        with pytest.raises(UserError):
            await whole(find(source.name), options, tmp_path)


async def test_asked_twice_at_once_it_serves_both_or_refuses_the_second(
    bed: Bed, options: Options, tmp_path: Path
) -> None:
    source, mounting, before = find(bed.text), mount_of(options, tmp_path), await bed.held()
    if bed.contents:
        async with AsyncExitStack() as stack:
            snapshot = await stack.enter_async_context(source.snapshot(mounting))
            with contextlib.suppress(UserError):
                assert await whole(find(bed.text), options, tmp_path) == bed.contents
            assert await contents(stack, snapshot, mounting) == bed.contents
        assert await bed.held() == before


async def test_cleaning_up_is_safe_where_there_is_nothing_and_again(bed: Bed, options: Options) -> None:
    source, before = find(bed.text), await bed.held()
    for _ in range(2):
        if bed.contents:
            assert await source.clean_up(options) == []
        else:
            with pytest.raises(UserError):
                await source.clean_up(options)
        with contextlib.suppress(UserError):
            assert not await source.thaw("/nonexistent")
    assert await bed.held() == before


async def test_where_there_are_no_checkpoints_that_is_said_and_none_can_be_forgotten(
    bed: Bed, options: Options
) -> None:
    source, before = find(bed.text), await bed.held()
    try:
        [line] = await source.checkpoints(options)
        assert line.startswith("no target has ")
    except UserError as error:
        assert "keeps no checkpoints" in error.what  # noqa: PT017 - either will do
    for others in (False, True):
        with contextlib.suppress(UserError):
            lines = await source.forget(options, "nas", others=others)
            assert others, lines
    assert await bed.held() == before


async def test_an_option_that_it_does_not_have_is_refused_by_name(bed: Bed, options: Options) -> None:
    source = find(bed.text)
    source.check(options)
    for name, value in bed.refused.items():
        with pytest.raises(UserError) as refused:
            source.check(Options(**{name: value}))  # type: ignore[arg-type]
        assert refused.value.exit_code == EXIT_USAGE
        assert f"{name}=" in f"{refused.value.what} {refused.value.hint}"
    await trio.lowlevel.checkpoint()


LIGHT = """
import sys
import qfsbackup.cli.main
from qfsbackup import options, sources
sources.TABLE["toy"] = "tests.contracts.toy"
source = sources.find(sys.argv[1])
source.check(options.Options())
source.is_there()
source.thaw_unheard("/nonexistent")
print(*{"trio", "nbd", "qemu", "pyfuse3", "libvirt"} & set(sys.modules))
"""


async def test_the_supervisor_has_one_without_anything_heavy(bed: Bed) -> None:
    done = await command(sys.executable, "-c", LIGHT, bed.text)
    assert (done.code, done.stdout, done.stderr) == (0, "\n", "")


# ---- the table ----


def test_a_library_that_is_missing_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libvirt", None)
    with pytest.raises(UserError, match="libvirt's Python module is missing") as refused:
        find("libvirt:web1")
    assert "python3-libvirt" in refused.value.hint


def test_a_scheme_imports_its_own_module_and_no_other() -> None:
    script = "import sys; from qfsbackup.sources import find; find(sys.argv[1])"
    script += "; print(*(name for name in sys.modules if name.startswith('qfsbackup.sources.')))"
    done = subprocess.run([sys.executable, "-c", script, "nbd://host/disk"], capture_output=True, text=True, check=True)
    assert "qfsbackup.sources.uri" in done.stdout.split()
    assert not {"qfsbackup.sources.vm", "qfsbackup.sources.qemu"} & set(done.stdout.split())


def test_an_unknown_scheme_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UserError, match="no source is called http:") as refused:
        find("http://host/disk")
    assert all(scheme in refused.value.hint for scheme in sources.TABLE)


# ---- the toy ----


async def test_a_new_kind_is_mounted_by_the_same_daemon_and_read(tmp_path: Path) -> None:
    async with BEDS["toy"](tmp_path) as bed:
        line: list[str | Path] = [*TOY, "mount", "--foreground", bed.text, tmp_path / "mnt"]
        async with mounting(line, tmp_path / "mnt") as process:
            mount = Mount(tmp_path / "mnt", process)
            for name, content in bed.contents.items():
                assert await aside(mount.image(name).read_bytes) == content
                chunk = mount.path / "chunks" / name / "000" / "00000000"
                assert await aside(chunk.read_bytes) == content
            described = await mount.json("vm.json")
            assert [disk["name"] for disk in described["disks"]] == ["vda", "vdb"]
            shown = await command(PROGRAM, "status", mount.path)
            assert shown.stdout.startswith(f"{mount.path}  {bed.text}  ready\n")
            assert (await command(PROGRAM, "umount", mount.path)).code == 0
        said = await command(*TOY, "run", f"toy:{tmp_path}/none", "--mountpoint", tmp_path / "mnt", "--", "true")
        said.refused(125, f"{tmp_path}/none: No such file or directory")
        refused = await command(*TOY, "checkpoints", bed.text)
        refused.refused(1, "keeps no checkpoints")
