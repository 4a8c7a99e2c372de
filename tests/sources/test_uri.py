# SPDX-License-Identifier: LGPL-2.1-or-later
"""NBD URIs as a source: which exports become disks, under which names, and what is refused."""

import time
from typing import Any

import pytest

from qfsbackup.errors import UserError
from qfsbackup.facts import Offer, Snapshot
from qfsbackup.sources.uri import UriSource, is_nbd_uri, vm_name
from qfsbackup.status import Status

URI = "nbd+unix:///?socket=/run/web1.sock"


def offer(name: str, *contexts: str, size: int = 4096, can_trim: bool = True) -> Offer:
    return Offer(name, f"nbd+unix:///{name}?socket=/run/web1.sock", size, can_trim, ("base:allocation", *contexts))


async def snapshot(offers: list[Offer], status: Status | None = None, **options: Any) -> Snapshot:
    """The snapshot of a server with these offers."""

    async def list_exports(uri: str) -> list[Offer]:
        assert uri == URI
        return offers

    source = UriSource(uri=URI, list_exports=list_exports, status=status or Status(), **options)
    async with source.snapshot() as found:
        return found


async def test_every_export_is_a_disk() -> None:
    status = Status()
    before = time.time_ns()
    found = await snapshot([offer("vda"), offer("vdb", size=8192, can_trim=False)], status)
    assert before <= found.instant <= time.time_ns()
    assert [(export.disk, export.size) for export in found.exports] == [("vda", 4096), ("vdb", 8192)]
    assert all(export.bitmap == "none" and export.dirty_context is None for export in found.exports)
    assert {name: disk.size for name, disk in status.disks.items()} == {"vda": 4096, "vdb": 8192}
    assert (found.vm, found.uuid, found.frozen) == ("web1", None, False)


async def test_the_export_without_a_name_is_called_disk() -> None:
    found = await snapshot([offer("")])
    assert [export.disk for export in found.exports] == ["disk"]


async def test_the_servers_data_is_trimmed_only_where_that_was_said() -> None:
    [export] = (await snapshot([offer("vda")])).exports
    assert not export.can_trim
    [export] = (await snapshot([offer("vda")], trim=True)).exports
    assert export.can_trim
    with pytest.raises(UserError, match="does not let the export 'vdb' be trimmed"):
        await snapshot([offer("vda"), offer("vdb", can_trim=False)], trim=True)


async def test_a_bitmap_is_the_dirty_map() -> None:
    found = await snapshot([offer("vda", "qemu:dirty-bitmap:b1")], bitmap="b1")
    [export] = found.exports
    assert (export.dirty_context, export.bitmap) == ("qemu:dirty-bitmap:b1", "reuse")


async def test_a_bitmap_that_is_missing_is_answered_with_what_is_there() -> None:
    with pytest.raises(UserError, match="no dirty bitmap 'b2'") as caught:
        await snapshot([offer("vda", "qemu:dirty-bitmap:b1")], bitmap="b2")
    assert "qemu:dirty-bitmap:b1" in caught.value.hint


async def test_disks_are_chosen_by_name() -> None:
    offers = [offer("vda"), offer("vdb"), offer("vdc")]
    chosen = await snapshot(offers, disks=["vda", "vdc"], exclude=["vdc"])
    assert [export.disk for export in chosen.exports] == ["vda"]
    left = await snapshot(offers, exclude=["vdb"])
    assert [export.disk for export in left.exports] == ["vda", "vdc"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"disks": ["vdz"]}, "no disk vdz"),
        ({"exclude": ["vdz"]}, "no disk vdz"),
        ({"exclude": ["vda"]}, "every disk"),
    ],
)
async def test_a_choice_that_cannot_be_met_names_the_disks(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        await snapshot([offer("vda")], **options)
    assert "vda" in caught.value.hint


async def test_two_disks_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="two exports"):
        await snapshot([offer(""), offer("disk")])


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("nbd+unix:///disk?socket=/run/vm/web1.sock", "web1"),
        ("nbds+unix:///?tls-certificates=/etc/pki&socket=%2Frun%2Fweb%201.nbd", "web 1"),
        ("nbd://web1/disk", "web1"),
        ("nbd://web1:10809/disk", "web1"),
        ("nbds://user@web1.example:10810/disk", "web1.example-10810"),
        ("nbd://[::1]/", "::1"),
        ("nbd:///", "localhost"),
    ],
)
def test_a_vm_is_called_after_its_socket_or_host(uri: str, name: str) -> None:
    assert vm_name(uri) == name


async def test_a_vm_is_called_what_the_person_says() -> None:
    assert (await snapshot([offer("vda")], vm="db")).vm == "db"


def test_only_nbd_uris_are_ours() -> None:
    assert all(is_nbd_uri(f"{scheme}://x/") for scheme in ("nbd", "nbd+unix", "nbds", "nbds+unix"))
    assert not any(is_nbd_uri(source) for source in ("/run/vm/web1.qmp", "qmp:/run/x", "http://x/", "nbd", "nbd:/x"))
