# SPDX-License-Identifier: LGPL-2.1-or-later
"""What real servers say they offer, and what a person hears about those that offer nothing."""

from pathlib import Path

import pytest
import trio

from qfsbackup.errors import UserError
from qfsbackup.nbd.listing import list_exports
from tests.harness.disk import MIB
from tests.harness.nbd_server import make_certificates, nbdkit, qemu_nbd, storage_daemon
from tests.harness.qemu import Qemu, run_img

TWO_DISKS = [
    *("--blockdev", "null-co,node-name=a,size=1048576", "--export", "nbd,id=e1,node-name=a,name=vda,writable=on"),
    *("--blockdev", "null-co,node-name=b,size=2097152", "--export", "nbd,id=e2,node-name=b,name=my disk%/?"),
]


async def test_every_export_of_a_server_is_listed(qemu: Qemu, tmp_path: Path) -> None:
    async with storage_daemon(qemu, tmp_path, TWO_DISKS) as server:
        offers = {offer.name: offer for offer in await list_exports(server.uri)}
        assert {name: (offer.size, offer.can_trim) for name, offer in offers.items()} == {
            "vda": (MIB, True),
            "my disk%/?": (2 * MIB, False),
        }
        for name, offer in offers.items():
            assert offer.contexts == ("base:allocation",)
            assert await list_exports(offer.uri) == [offer], f"the URI of {name!r} leads elsewhere"


async def test_an_unknown_export_is_answered_with_the_known_ones(qemu: Qemu, tmp_path: Path) -> None:
    async with storage_daemon(qemu, tmp_path, TWO_DISKS) as server:
        with pytest.raises(UserError, match="has no export 'vdz'") as caught:
            await list_exports(server.export("vdz"))
        assert "vda" in caught.value.hint


async def test_the_contexts_of_an_export_have_its_bitmaps(qemu: Qemu, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    await run_img(qemu, "create", "-q", "-f", "qcow2", image, "1M")
    await run_img(qemu, "bitmap", "--add", image, "changed")
    options = ["-B", "changed", "-x", "vda"]
    async with qemu_nbd(qemu, tmp_path, image, image_format="qcow2", options=options) as server:
        [offer] = await list_exports(server.uri)
    assert offer.name == "vda"
    assert set(offer.contexts) == {"base:allocation", "qemu:dirty-bitmap:changed"}


@pytest.mark.parametrize("style", [[], ["--oldstyle"], ["--mask-handshake=0"]], ids=["new", "old", "no-options"])
async def test_a_server_with_one_nameless_export(tmp_path: Path, style: list[str]) -> None:
    async with nbdkit(tmp_path, [*style, "memory", "1M"]) as server:
        [offer] = await list_exports(server.uri)
        assert (offer.name, offer.size, offer.can_trim) == ("", MIB, True)


async def test_tls_is_asked_for_by_the_uri(tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path / "pki")
    async with nbdkit(tmp_path, ["null", "1M"], tcp=True, certificates=certificates) as server:
        [offer] = await list_exports(server.uri)
        assert offer.size == MIB
        assert "tls-certificates=" in offer.uri
        with pytest.raises(UserError, match="TLS"):
            await list_exports(f"nbd://localhost:{server.port}/")


async def test_a_server_without_tls_is_not_trusted_with_a_tls_uri(tmp_path: Path) -> None:
    async with nbdkit(tmp_path, ["null", "1M"]) as server:
        with pytest.raises(UserError, match="TLS"):
            await list_exports(server.uri.replace("nbd+unix:", "nbds+unix:"))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("nbd+unix:///?socket=/nonexistent/socket", "/nonexistent/socket cannot be reached"),
        ("nbd://localhost:1/", "localhost:1 cannot be reached"),
        ("nbd://no-such-host.invalid/", "no-such-host.invalid has no address"),
        ("nbd+unix:///vda", "is not an NBD URI"),
        ("nbd://localhost:abc/", "is not an NBD URI"),
    ],
)
async def test_an_address_without_a_server(uri: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        await list_exports(uri)
    assert caught.value.hint.endswith(".")


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n" * 20, b""], ids=["ssh", "hangs-up"])
async def test_something_that_is_no_nbd_server(tmp_path: Path, greeting: bytes) -> None:
    path = tmp_path / "socket"
    listening = trio.socket.socket(trio.socket.AF_UNIX)
    with listening:
        await listening.bind(str(path))
        listening.listen()

        async def greet() -> None:
            while True:
                connected, _ = await listening.accept()
                with connected:
                    await connected.send(greeting)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(greet)
            with pytest.raises(UserError, match="does not speak NBD"):
                await list_exports(f"nbd+unix:///?socket={path}")
            nursery.cancel_scope.cancel()
