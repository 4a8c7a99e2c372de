# SPDX-License-Identifier: LGPL-2.1-or-later
"""NBD URIs as a source: which exports become disks, under which names, and what is refused."""

from typing import Any

import pytest

from qfsbackup.errors import UserError
from qfsbackup.nbd.export import Offer
from qfsbackup.options import Options
from qfsbackup.sources.uri import choose, export, vm_name


def offer(name: str, *contexts: str, size: int = 4096, can_trim: bool = True) -> Offer:
    return Offer(name, f"nbd+unix:///{name}?socket=/run/web1.sock", size, can_trim, ("base:allocation", *contexts))


def chosen(offers: list[Offer], **options: Any) -> dict[str, Offer]:
    """What becomes a disk of a server with these offers."""
    return choose(offers, Options(**options))


def test_the_export_without_a_name_is_called_disk() -> None:
    assert list(chosen([offer("")])) == ["disk"]


def test_the_servers_data_can_only_be_given_away_where_it_takes_trims() -> None:
    options = Options(trim_server_data=True)
    assert export("vda", offer("vda"), options).size == 4096
    with pytest.raises(UserError, match="does not let the export 'vdb' be trimmed"):
        export("vdb", offer("vdb", can_trim=False), options)


def test_a_bitmap_is_the_dirty_map() -> None:
    found = export("vda", offer("vda", "qemu:dirty-bitmap:b1"), Options(bitmap="b1"))
    assert found.dirty_context == "qemu:dirty-bitmap:b1"


def test_a_bitmap_that_is_missing_is_answered_with_what_is_there() -> None:
    with pytest.raises(UserError, match="no dirty bitmap 'b2'") as caught:
        export("vda", offer("vda", "qemu:dirty-bitmap:b1"), Options(bitmap="b2"))
    assert "qemu:dirty-bitmap:b1" in caught.value.hint


def test_disks_are_chosen_by_name() -> None:
    offers = [offer("vda"), offer("vdb"), offer("vdc")]
    assert list(chosen(offers, disks=("vda", "vdc"), exclude=("vdc",))) == ["vda"]
    assert list(chosen(offers, exclude=("vdb",))) == ["vda", "vdc"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"disks": ("vdz",)}, "no disk vdz"),
        ({"exclude": ("vdz",)}, "no disk vdz"),
        ({"exclude": ("vda",)}, "every disk"),
    ],
)
def test_a_choice_that_cannot_be_met_names_the_disks(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        chosen([offer("vda")], **options)
    assert "vda" in caught.value.hint


def test_two_disks_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="two exports"):
        chosen([offer(""), offer("disk")])


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
