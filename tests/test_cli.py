# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands as a person or a script calls them: help, errors of two lines, exit statuses, mount(8) and `run`."""

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from qfsbackup.tasks import background
from tests.harness.files import opened_to_all
from tests.harness.mount import (
    DONE,
    PROGRAM,
    as_user,
    command,
    is_mounted,
    mounted,
    qfsbackup,
)
from tests.harness.qemu import Qemu
from tests.harness.sockets import listening
from tests.harness.vm import Vm, running_vm

USER = 41234


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
            "fleece-limit=1",
            "fleece-limit=63k",
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
            "trim-server-data=yes",
        )
    ),
]


@pytest.mark.parametrize(("words", "expected"), WRONG, ids=lambda value: " ".join(value) if value != "" else "none")
async def test_wrong_usage_is_refused_by_name(words: Sequence[str], expected: str) -> None:
    (await qfsbackup(*words)).refused(1, expected)


NBD = "nbd://localhost/disk"
MEANT: list[tuple[str, str, str, str]] = [  # the source, the options, words of the first line, and of the second
    ("/a.qmp", "allow_other", "unknown option: allow_other", "uid=, gid= or mode="),
    ("/a.qmp", "rw,default_permissions", "unknown option: default_permissions", "mode="),
    ("/a.qmp", "disks=vda,vdb", "unknown option: vdb", "disks=vda:vdb"),
    ("/a.qmp", "exclude=vda,vdb", "unknown option: vdb", "have : between them"),
    ("/a.qmp", "disks=vda,vdb=1", "unknown option: vdb", "The options are: access, agent"),
    ("/a.qmp", "vm=a,uid=1,vm=b", "the option vm is given twice", "Say it once"),
    ("/a.qmp", "disks=vda,disks=vdb", "the option disks is given twice", "Say it once"),
    ("/a.qmp", "fleece-limit=1", "fleece-limit=1 cannot be understood", "64k or more"),
    ("/a.qmp", "bitmap=b0", "bitmap= is for an NBD URI", "target=NAME"),
    ("/a.qmp", "trim-server-data", "trim-server-data is for an NBD URI", "our own"),
    (NBD, "target=nas", "an NBD server keeps no checkpoints", "QMP socket"),
    (NBD, "agent=/a.agent", "no guest to freeze", "QMP socket"),
    (NBD, "freeze=require", "no guest to freeze", "QMP socket"),
    (NBD, "discard=release", "would trim the server's own data", "-o trim-server-data"),
]


@pytest.mark.parametrize(("source", "options", "what", "hint"), MEANT, ids=lambda value: value.replace(" ", "_"))
async def test_what_was_meant_is_in_the_second_line(source: str, options: str, what: str, hint: str) -> None:
    done = await qfsbackup("mount", source, "/b", "-o", options)
    done.refused(1, what)
    assert hint in done.stderr.splitlines()[1], done.stderr


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
        (await qfsbackup("mount", vm.qmp, directory, "-o", f"fleece={small}")).refused(
            32, "small", "too little room: 1024 KiB are left"
        )
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
