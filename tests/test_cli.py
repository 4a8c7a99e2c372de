# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands as a person or a script calls them: help, errors of two lines, exit statuses, mount(8) and `run`."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import termios
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.e2e.support import idle_vm, left_as_it_was
from tests.harness.mount import (
    PROGRAM,
    Result,
    as_user,
    aside,
    command,
    is_mounted,
    mounted,
    qfsbackup,
    start,
    taken_away,
)
from tests.harness.qemu import Qemu
from tests.harness.sockets import listening
from tests.harness.tasks import background
from tests.harness.vm import Vm, running_vm

DONE = Result(0, "", "")
USER = 41234


@pytest.fixture
async def vm(qemu: Qemu, tmp_path: Path) -> AsyncIterator[Vm]:
    """A running VM whose mount, if a test leaves one, is taken away."""
    async with idle_vm(qemu, tmp_path) as vm:
        yield vm


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "mnt"
    path.mkdir()
    return path


@contextlib.asynccontextmanager
async def answering(path: Path, line: bytes) -> AsyncIterator[None]:
    """A fake server on a unix socket, for what no QEMU here says: `line` for every line it gets, and as a greeting."""

    async def serve(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(line)
            async for _ in stream:
                await stream.send_all(line)

    async with serving(path, serve):
        yield


@contextlib.asynccontextmanager
async def serving(path: Path, serve: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[None]:
    """A server on a unix socket for the length of the block."""
    with listening([path]) as sockets:
        sockets[0].setblocking(False)
        listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(sockets[0]))]
        async with background(partial(trio.serve_listeners, serve, listeners)):
            yield


# ---- help ----


@pytest.mark.parametrize(
    "name", ["", "mount", "umount", "status", "cleanup", "run", "commit", "checkpoints", "restore"]
)
async def test_help_reads_well(name: str) -> None:
    done = await qfsbackup(*name.split(), "--help")
    assert (done.code, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: qfsbackup{' ' if name else ''}{name} ")
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    if name in ("mount", "run"):
        for option in ("fleece", "fleece-limit", "freeze", "agent", "disks", "exclude", "bwlimit", "connections"):
            assert f"{option}=" in done.stdout
        for option in ("uid", "gid", "mode", "vm", "bitmap"):
            assert f"{option}=" in done.stdout


# ---- errors of the command line ----

WRONG: list[tuple[Sequence[str], str]] = [
    ([], "COMMAND"),
    (["fly"], "fly"),
    (["mount"], "SOURCE"),
    (["mount", "/a.qmp"], "DIR"),
    (["mount", "/a.qmp", "/b", "--wrong"], "--wrong"),
    (["mount", "/a.qmp", "/b", "--", "ls"], "only `run`"),
    (["run", "/a.qmp"], "no command"),
    (["run", "/a.qmp", "--"], "no command"),
    (["mount", "/a.qmp", "/b", "-o", "excude=vda"], "unknown option: excude"),
    (["mount", "/a.qmp", "/b", "-o", "ro,Freeze=off"], "unknown option: Freeze"),
    *(
        (["mount", "/a.qmp", "/b", "-o", option], f"option {option} cannot be understood")
        for option in (
            "fleece=",
            "fleece-limit=1X",
            "fleece-limit=0",
            "freeze=maybe",
            "agent=",
            "disks=",
            "exclude=:",
            "bwlimit=fast",
            "connections=0",
            "connections=17",
            "uid=root",
            "gid=-1",
            "mode=9",
            "mode=77777",
            "vm=",
            "bitmap=",
        )
    ),
]


@pytest.mark.parametrize(("words", "expected"), WRONG, ids=lambda value: " ".join(value) if value != "" else "none")
async def test_wrong_usage_is_refused_by_name(words: Sequence[str], expected: str) -> None:
    (await qfsbackup(*words)).refused(1, expected)


async def test_a_wrong_option_is_refused_by_cleanup_and_mount_helper_too() -> None:
    (await qfsbackup("cleanup", "/a.qmp", "-o", "agnet=/x")).refused(1, "unknown option: agnet")
    helper = PROGRAM.with_name("mount.qfsbackup")
    (await command(helper, "/a.qmp", "/b", "-o", "rw,wrong=1")).refused(1, "unknown option: wrong")
    (await command(helper, "/a.qmp")).refused(1, "DIR")
    assert await command(helper, "-f", "-n", "-s", "/a.qmp", "/b", "-t", "qfsbackup", "-o", "rw,noauto,x-a=b") == DONE


# ---- errors of the source ----


async def test_what_is_no_qmp_socket_is_refused(tmp_path: Path, directory: Path) -> None:
    (await qfsbackup("mount", tmp_path / "missing.qmp", directory)).refused(32, "missing.qmp")
    (tmp_path / "file").touch()
    (await qfsbackup("mount", tmp_path / "file", directory)).refused(32, "file")
    async with answering(tmp_path / "other.sock", b"220 mail.example.org ESMTP\r\n"):
        (await qfsbackup("mount", tmp_path / "other.sock", directory)).refused(32, "other.sock")
    (await qfsbackup("mount", "pve://100", directory)).refused(1, "pve")


async def test_a_qemu_that_is_too_old_is_refused(tmp_path: Path, directory: Path) -> None:
    """A fake, for no QEMU of that age is to be had."""
    version = {"qemu": {"major": 7, "minor": 0, "micro": 0}, "package": ""}
    greeting = json.dumps({"QMP": {"version": version, "capabilities": []}}).encode() + b"\r\n"

    async def serve(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(greeting)
            async for request in stream:  # the product waits for each answer
                await stream.send_all(_old_answer(json.loads(request), version))

    async with serving(tmp_path / "old.qmp", serve):
        (await qfsbackup("mount", tmp_path / "old.qmp", directory)).refused(32, "QEMU 7.0.0 is too old")


def _old_answer(request: dict[str, Any], version: dict[str, Any]) -> bytes:
    answers: dict[str, Any] = {
        "query-version": version,
        "query-status": {"status": "running", "running": True, "singlestep": False},
        "query-name": {},
        "query-uuid": {"UUID": "00000000-0000-0000-0000-000000000000"},
        "query-migrate": {},
        "qmp_capabilities": {},
        "x-debug-query-block-graph": {"nodes": [], "edges": []},
    }
    answer = {"return": answers.get(request["execute"], []), "id": request.get("id")}
    return json.dumps(answer).encode() + b"\r\n"


@pytest.mark.one_qemu
async def test_a_busy_qmp_socket_is_told_from_a_dead_vm(vm: Vm, directory: Path) -> None:
    async with await trio.open_unix_socket(str(vm.qmp)):
        (await qfsbackup("mount", vm.qmp, directory)).refused(32, str(vm.qmp))


@pytest.mark.one_qemu
async def test_without_permission_nothing_is_mounted(vm: Vm) -> None:
    with opened_to_all(vm.qmp.parent):
        done = await command(*as_user(USER, PROGRAM, "mount", vm.qmp, "/mnt"))
    done.refused(1, "needs root")


@contextlib.contextmanager
def opened_to_all(folder: Path) -> Iterator[None]:
    """Let every user enter a folder of pytest's, and what stands above it."""
    folders = [path for path in (folder, *folder.parents) if not path.stat().st_mode & 0o001]
    modes = [path.stat().st_mode for path in folders]
    for path in folders:
        path.chmod(0o711)
    try:
        yield
    finally:
        for path, mode in zip(folders, modes, strict=True):
            path.chmod(mode)


@pytest.mark.one_qemu
async def test_disks_that_are_not_there_are_refused(vm: Vm, directory: Path) -> None:
    (await qfsbackup("mount", vm.qmp, directory, "-o", "exclude=vda:vdb")).refused(32, "no disk")
    (await qfsbackup("mount", vm.qmp, directory, "-o", "disks=vda:sdx")).refused(1, "sdx")
    assert not is_mounted(directory)


@pytest.mark.one_qemu
async def test_a_vm_without_disks_is_refused(qemu: Qemu, tmp_path: Path, directory: Path) -> None:
    async with running_vm(qemu, tmp_path, []) as bare:
        (await qfsbackup("mount", bare.qmp, directory)).refused(32, "no disk")


# ---- errors of folders ----


@pytest.mark.one_qemu
async def test_a_fleecing_folder_must_be_there_and_have_room(vm: Vm, directory: Path, tmp_path: Path) -> None:
    missing = f"fleece={tmp_path / 'missing'}"
    (await qfsbackup("mount", vm.qmp, directory, "-o", missing)).refused(32, "missing", "No such file")
    (tmp_path / "file").touch()
    (await qfsbackup("mount", vm.qmp, directory, "-o", f"fleece={tmp_path / 'file'}")).refused(32, "file")
    small = tmp_path / "small"
    small.mkdir()
    assert await command("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small) == DONE
    try:
        (await qfsbackup("mount", vm.qmp, directory, "-o", f"fleece={small}")).refused(32, "small", "full")
    finally:
        await command("umount", small)
    assert await qfsbackup("status", directory) != DONE


@pytest.mark.one_qemu
async def test_a_mountpoint_must_be_a_free_folder(vm: Vm, directory: Path, tmp_path: Path) -> None:
    (await qfsbackup("mount", vm.qmp, tmp_path / "missing")).refused(32, "missing")
    (tmp_path / "file").touch()
    (await qfsbackup("mount", vm.qmp, tmp_path / "file")).refused(32, "not a folder")
    async with mounted(vm.qmp, directory):
        (await qfsbackup("mount", vm.qmp, directory)).refused(32, "already")


async def test_what_is_not_mounted_is_said_so(tmp_path: Path) -> None:
    (await qfsbackup("umount", tmp_path)).refused(2, "no snapshot is mounted")
    (await qfsbackup("status", tmp_path / "missing")).refused(2, "no snapshot is mounted")
    (await qfsbackup("umount", "/")).refused(2, "no snapshot is mounted")


# ---- mount(8) and fstab ----


@pytest.fixture
def helper() -> Path:
    """/sbin/mount.qfsbackup, where mount(8) looks, as `./run setup` links it (another checkout may have, since)."""
    link, ours = Path("/sbin/mount.qfsbackup"), PROGRAM.with_name("mount.qfsbackup")
    if link.resolve() != ours.resolve():
        new = link.with_name(f"mount.qfsbackup.{os.getpid()}")
        new.symlink_to(ours)
        new.rename(link)
    return link


@pytest.mark.one_qemu
@pytest.mark.usefixtures("helper")
async def test_mount_8_mounts_and_unmounts(vm: Vm, directory: Path) -> None:
    options = "ro,noauto,nofail,_netdev,x-systemd.automount,disks=vdb,mode=440"
    assert await command("mount", "-t", "qfsbackup", vm.qmp, directory, "-o", options) == DONE
    assert await aside(os.listdir, directory / "images") == ["vdb.raw"]
    found = await command("findmnt", "-n", "-o", "FSTYPE,SOURCE", directory)
    assert found.stdout.split() == ["fuse.qfsbackup", str(vm.qmp)]
    async with left_as_it_was_without_mount(vm, directory):
        assert await command("umount", directory) == DONE


@contextlib.asynccontextmanager
async def left_as_it_was_without_mount(vm: Vm, directory: Path) -> AsyncIterator[None]:
    """After the block there is no mount, and soon no filter in QEMU."""
    yield
    assert not is_mounted(directory)
    with trio.fail_after(20):
        while (await qfsbackup("cleanup", vm.qmp)).code != 0:
            pass


@pytest.mark.one_qemu
@pytest.mark.usefixtures("helper")
async def test_fstab_mounts_and_a_failure_has_two_lines_and_32(vm: Vm, directory: Path, tmp_path: Path) -> None:
    fstab = tmp_path / "fstab"
    fstab.write_text(f"{vm.qmp} {directory} qfsbackup defaults,rw,exclude=vda,x-systemd.requires=vm.service 0 0\n")
    assert await command("mount", "-a", "-T", fstab) == DONE
    assert await aside(os.listdir, directory / "images") == ["vdb.raw"]
    assert await qfsbackup("umount", directory) == DONE
    (await command("mount", "-t", "qfsbackup", tmp_path / "none.qmp", directory)).refused(32, "none.qmp")
    wrong = await command("mount", "-t", "qfsbackup", vm.qmp, directory, "-o", "nope=1")
    wrong.refused(1, "unknown option: nope")


# ---- status ----

DISK_KEYS = {"size", "data", "dirty", "bitmap", "nbd_bytes", "nbd_requests", "read_bytes", "read_errors", "punched"}
DISK_KEYS |= {"trimmed", "fleecing_used"}
KEYS = {"format", "source", "mountpoint", "pid", "ppid", "vm", "instant", "frozen", "pause_ms", "state", "broken"}
KEYS |= {"vm_gone", "fleecing", "disks"}


@pytest.mark.one_qemu
async def test_status_has_its_shape(vm: Vm, directory: Path) -> None:
    async with mounted(vm.qmp, directory) as mount:
        await aside(mount.image("vda").read_bytes)
        listed = json.loads((await qfsbackup("status", directory, "--json")).stdout)
        text = await qfsbackup("status", directory)
        everywhere = await qfsbackup("status")
    [status] = listed
    assert (status["format"], status["state"], status["broken"], status["vm_gone"]) == (1, "ready", None, None)
    assert status.keys() >= KEYS
    assert (status["source"], status["mountpoint"]) == (str(vm.qmp), str(directory))
    assert status["fleecing"].keys() >= {"used", "free", "limit"}
    assert set(status["disks"]) == {"vda", "vdb"}
    assert status["disks"]["vda"].keys() >= DISK_KEYS
    assert status["disks"]["vda"]["read_bytes"] == status["disks"]["vda"]["size"] == 4 << 20
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", status["instant"])
    assert text.stdout.startswith(f"{directory}  {vm.qmp}  ready\n")
    assert "  vda: 4 MiB, data 260 KiB, dirty 4 MiB (none); read 4 MiB, " in text.stdout
    assert str(directory) in everywhere.stdout


# ---- run ----


async def run_in_mount(vm: Vm, directory: Path, *words: str | Path, **options: Any) -> Result:
    return await qfsbackup("run", vm.qmp, "--mountpoint", directory, "--", *words, **options)


@pytest.mark.one_qemu
async def test_run_gives_the_command_the_mount_and_passes_its_status_on(vm: Vm, directory: Path) -> None:
    async with left_as_it_was(vm):
        script = "pwd; echo $QFSBACKUP_MOUNT; ls -d images vm.json; cat images/vda.raw | wc -c; echo told >&2; exit 7"
        done = await run_in_mount(vm, directory, "sh", "-c", script)
        assert done.code == 7
        assert done.stdout.split() == [str(directory)] * 2 + ["images", "vm.json", str(4 << 20)]
        assert "told\n" in done.stderr
        assert re.search(r"2 disks, 8 MiB dirty, 4 MiB read, fleecing .*, guest paused [0-9.]+ ms, ", done.stderr)
        assert not is_mounted(directory)
    assert (await run_in_mount(vm, directory, "true")).code == 0
    assert (await run_in_mount(vm, directory, "sh", "-c", "kill -USR1 $$")).code == 128 + signal.SIGUSR1


@pytest.mark.one_qemu
async def test_run_uses_the_same_mountpoint_each_time(vm: Vm) -> None:
    """Backup tools know a file by its path."""
    first = await qfsbackup("run", vm.qmp, "--", "pwd")
    second = await qfsbackup("run", vm.qmp.name, "--", "pwd", cwd=vm.qmp.parent)
    assert first.stdout == second.stdout
    assert first.stdout.startswith("/run/qfsbackup/mnt/")


@pytest.mark.one_qemu
async def test_our_own_failure_is_125(vm: Vm, directory: Path, tmp_path: Path) -> None:
    (await qfsbackup("run", tmp_path / "missing.qmp", "--", "true")).refused(125, "missing.qmp")
    async with left_as_it_was(vm):
        done = await run_in_mount(vm, directory, "no-such-program")
        assert done.code == 125
        assert "cannot run no-such-program" in done.stderr
        assert not is_mounted(directory)


@pytest.mark.one_qemu
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_goes_to_the_command_which_may_end_in_order(
    vm: Vm, directory: Path, tmp_path: Path, number: signal.Signals
) -> None:
    os.mkfifo(tmp_path / "fifo")
    script = f"trap 'kill $!; exit 9' TERM HUP; sleep 600 & echo ready > {tmp_path / 'fifo'}; wait"
    async with left_as_it_was(vm), taken_away(directory, vm.qmp):
        run = start(
            PROGRAM, "run", vm.qmp, "--mountpoint", directory, "--", "sh", "-c", script, stderr=subprocess.DEVNULL
        )
        with run:
            assert await aside((tmp_path / "fifo").read_text) == "ready\n"
            run.send_signal(number)
            assert await aside(run.wait) == 9
        assert not is_mounted(directory)


@pytest.mark.one_qemu
async def test_a_command_that_leaves_a_process_behind_does_not_keep_the_mount(vm: Vm, directory: Path) -> None:
    async with left_as_it_was(vm):
        script = "sleep 600 < images/vda.raw > /dev/null 2>&1 & echo $!"
        done = await run_in_mount(vm, directory, "sh", "-c", script)
        os.kill(int(done.stdout), signal.SIGKILL)
        assert (done.code, "still in use" in done.stderr) == (0, True), done
        assert not is_mounted(directory)


@pytest.mark.one_qemu
async def test_a_killed_run_gives_the_vm_back(vm: Vm, directory: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    async with left_as_it_was(vm), taken_away(directory, vm.qmp):
        script = f"echo ready > {tmp_path / 'fifo'}; exec sleep 600"
        with start(PROGRAM, "run", vm.qmp, "--mountpoint", directory, "--", "sh", "-c", script) as run:
            assert await aside((tmp_path / "fifo").read_text) == "ready\n"
            [status] = json.loads((await qfsbackup("status", directory, "--json")).stdout)
            supervisor = os.pidfd_open(status["ppid"])
            run.kill()
        with trio.fail_after(30):
            await trio.lowlevel.wait_readable(supervisor)
        os.close(supervisor)
        assert not is_mounted(directory)


@pytest.mark.one_qemu
async def test_run_draws_a_bar_on_a_terminal(vm: Vm, directory: Path) -> None:
    main, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    try:
        words = ("cat", "images/vda.raw", "images/vdb.raw")
        with start(
            PROGRAM,
            "run",
            vm.qmp,
            "--mountpoint",
            directory,
            "--",
            *words,
            stdin=terminal,
            stdout=subprocess.DEVNULL,
            stderr=terminal,
            env={**os.environ, "TERM": "xterm"},
        ) as run:
            os.close(terminal)
            shown = await aside(read_all, main)
            assert await aside(run.wait) == 0, shown
    finally:
        os.close(main)
    assert re.search(r"\rread +\d+%\|.*\| 8\.00MB of 8\.00MB, .*B/s, fleecing \d", shown), shown


def read_all(terminal: int) -> str:
    parts = []
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while part := os.read(terminal, 65536):
            parts.append(part)
    return b"".join(parts).decode(errors="replace")
