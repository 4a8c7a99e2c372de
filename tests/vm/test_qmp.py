# SPDX-License-Identifier: LGPL-2.1-or-later
"""The QMP socket: what can be wrong with it, and what is not for every monitor (see tests/contracts)."""

import socket
from pathlib import Path

import pytest
import trio

from qfsbackup.errors import UserError
from qfsbackup.vm.monitors.qmp_socket import connect
from tests.harness.disk import MIB, Disk
from tests.harness.nbd_server import qemu_nbd
from tests.harness.qemu import Qemu
from tests.harness.sockets import listening
from tests.harness.vm import Vm, running_vm


def ignore(_reason: str) -> None:
    """For connections whose end is no news."""


async def refusal(path: Path) -> UserError:
    """The error of connecting to `path`."""
    with pytest.raises(UserError) as caught:
        async with connect(path, ignore):
            pytest.fail("was not refused")
    return caught.value


async def test_no_such_socket(tmp_path: Path) -> None:
    error = await refusal(tmp_path / "missing")
    assert "No such file" in error.what
    assert "-qmp" in error.hint


async def test_an_ordinary_file_and_a_stale_socket(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file, not" in (await refusal(tmp_path / "file")).what
    with listening([tmp_path / "stale"]):
        pass
    assert "refused" in (await refusal(tmp_path / "stale")).what


async def test_a_path_that_is_too_long_for_a_socket(tmp_path: Path) -> None:
    assert "107" in (await refusal(tmp_path / ("x" * 120))).hint


async def test_a_socket_of_another_type(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(str(tmp_path / "datagrams"))
        assert "another type" in (await refusal(tmp_path / "datagrams")).hint


@pytest.mark.one_qemu
async def test_an_nbd_server_is_no_qmp_server(qemu: Qemu, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(MIB))
    async with qemu_nbd(qemu, tmp_path, image) as server:
        assert server.socket is not None
        assert "does not speak QMP" in (await refusal(server.socket)).what


@pytest.mark.parametrize("greeting", [b'{"hello": 1}\n', b"{nonsense}\n"])
async def test_json_alone_is_no_qmp_either(tmp_path: Path, greeting: bytes) -> None:
    """A fake: no server that we know greets so."""
    with listening([tmp_path / "socket"]) as [listener]:
        listener.setblocking(False)

        async def greet() -> None:
            client, _ = await trio.socket.from_stdlib_socket(listener).accept()
            await client.send(greeting)
            with client:
                await client.recv(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(greet)
            assert "does not speak QMP" in (await refusal(tmp_path / "socket")).what


async def test_a_server_that_hangs_up(tmp_path: Path) -> None:
    with listening([tmp_path / "socket"]) as [listener]:
        listener.setblocking(False)

        async def hang_up() -> None:
            client, _ = await trio.socket.from_stdlib_socket(listener).accept()
            client.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hang_up)
            assert "closed the connection" in (await refusal(tmp_path / "socket")).what


async def test_a_socket_that_somebody_else_holds(paused_vm: Vm) -> None:
    async with connect(paused_vm.qmp, ignore):
        error = await refusal(paused_vm.qmp)
    assert "another program holds this QMP socket" in error.what
    assert "one more QMP socket" in error.hint
    async with connect(paused_vm.qmp, ignore) as qmp:  # and it is free again
        assert (await qmp.execute("query-status"))["status"] == "prelaunch"


@pytest.mark.one_qemu
async def test_an_agents_socket_is_silent(qemu: Qemu, tmp_path: Path) -> None:
    async with running_vm(qemu, tmp_path, [], agent=True) as vm:
        assert vm.agent is not None
        assert "guest agent" in (await refusal(vm.agent)).what


async def test_our_own_end_is_not_told_as_a_loss(paused_vm: Vm) -> None:
    reasons: list[str] = []
    async with connect(paused_vm.qmp, reasons.append) as qmp:
        await qmp.execute("query-status")
    assert reasons == []


async def test_every_name_of_a_vm_with_many_disks_arrives(qemu: Qemu, tmp_path: Path) -> None:
    """Answers may be long: asyncio's own limit of a line would be 64 KiB."""
    disks = [Disk(f"disk{i:02}", tmp_path / f"{i}.qcow2", MIB, "qcow2", "virtio-scsi") for i in range(56)]
    async with running_vm(qemu, tmp_path, disks) as vm, connect(vm.qmp, ignore) as qmp:
        nodes = await qmp.execute("query-named-block-nodes")
    assert len(nodes) == 112
    assert len(str(nodes)) > 64 * 1024
