# SPDX-License-Identifier: LGPL-2.1-or-later
"""The names of disks."""

import random

from hypothesis import given
from hypothesis import strategies as st

from qfsbackup.vm.look.names import Place, disk_names, qom_path, shifts

IDS = st.sampled_from(["a", "b", "c"])
PATHS = st.one_of(
    IDS,
    st.builds("/machine/peripheral/{}/virtio-backend".format, IDS),
    st.builds("/machine/peripheral/{}/bus.0/legacy[{}]".format, IDS, st.integers(0, 2)),
    st.builds("/machine/peripheral-anon/device[{}]/virtio-backend".format, st.integers(0, 5)),
    st.builds("/machine/unattached/device[{}]".format, st.integers(0, 5)),
)
NODES = st.one_of(st.just(""), IDS, st.builds("#block{}".format, st.integers(100, 999)))
PLACES = st.lists(
    st.builds(Place, PATHS, st.one_of(st.just(""), IDS), NODES), unique_by=lambda place: qom_path(place.qdev)
)


@given(PLACES)
def test_names_are_unique_and_never_generated_ones(places: list[Place]) -> None:
    names = disk_names(places)
    assert len(set(names)) == len(places)
    assert not [name for name in names if not name or name.startswith("#")]


@given(PLACES, st.integers())
def test_the_order_does_not_matter(places: list[Place], seed: int) -> None:
    shuffled = random.Random(seed).sample(places, len(places))
    names = dict(zip(places, disk_names(places), strict=True))
    assert disk_names(shuffled) == [names[place] for place in shuffled]


def test_a_disk_is_called_by_what_a_person_named_first() -> None:
    places = {
        Place("sda", "drive0", "node0"): "sda",
        Place("/machine/peripheral/vda/virtio-backend", "", "#block123"): "vda",
        Place("/machine/unattached/device[16]", "ide0-hd0", "#block456"): "ide0-hd0",
        Place("/machine/peripheral-anon/device[0]/virtio-backend", "", "root"): "root",
        Place(
            "/machine/peripheral-anon/device[1]/virtio-backend", "", "#block7"
        ): "peripheral-anon/device[1]/virtio-backend",
        Place("/machine/system.flash0", "", "#block8"): "system.flash0",
    }
    assert disk_names(list(places)) == list(places.values())


def test_an_id_wins_against_another_disks_block_device_name() -> None:
    assert disk_names([Place("/machine/unattached/device[1]", "x", "n"), Place("x", "", "")]) == ["n", "x"]


def test_names_that_another_disk_may_get() -> None:
    """QEMU's own for `-drive` without id=, and places; not what a person or libvirt named."""
    assert all(shifts(name) for name in ("virtio0", "ide0-hd0", "scsi0-cd12", "pflash1", "none3", "sd0", "floppy0"))
    assert shifts("peripheral-anon/device[1]/virtio-backend")
    kept = ["vda", "drive0", "virtio-disk0", "scsi0-0-0-1", "drive-scsi0", "system.flash0", "virtio0x", "ide0"]
    assert not any(shifts(name) for name in kept)
