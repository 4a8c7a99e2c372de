# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a bitmap that QEMU tells of is worth as a base."""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qfsbackup.facts import Base
from qfsbackup.vm.bitmaps.checkpoint import GRANULARITY, Checkpoint, bitmap_name, low_name, starting_point, unusable
from qfsbackup.vm.bitmaps.leftovers import bitmaps_of
from qfsbackup.vm.bitmaps.low_water import low_water
from qfsbackup.vm.look.graph import Device as GraphDisk
from qfsbackup.vm.look.graph import Node

SIZE = 16 << 20
OLD, NEW, OTHER = "0" * 15 + "a", "0" * 15 + "b", "0" * 15 + "c"
GOOD: dict[str, Any] = {
    "name": bitmap_name("nas", OLD),
    "recording": True,
    "busy": False,
    "persistent": True,
    "granularity": GRANULARITY,
    "count": 0,
}
COMPANION = GOOD | {"name": low_name(bitmap_name("nas", OLD)), "recording": False, "count": SIZE}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"count": SIZE}, ""),
        ({"persistent": False}, ""),
        ({"inconsistent": False}, ""),
        ({"inconsistent": True}, "not stored completely"),
        ({"inconsistent": True, "recording": False, "busy": True}, "not stored completely"),
        ({"recording": False}, "disabled"),
        ({"busy": True}, "in use"),
        ({"granularity": GRANULARITY // 2}, "has granularity 32768, not 65536"),
        ({"granularity": GRANULARITY * 2}, "has granularity 131072, not 65536"),
        (None, "is not there"),
    ],
    ids=str,
)
def test_a_bitmap_is_a_base_only_if_it_holds_every_write(change: dict[str, Any] | None, reason: str) -> None:
    bitmaps = (COMPANION,) if change is None else (GOOD | change, COMPANION)
    name = bitmap_name("nas", OLD)
    said = unusable(_node(bitmaps), name)
    assert reason in said
    assert bool(reason) == bool(said)
    point = starting_point(_disk(*bitmaps), "nas", NEW, {"vda": Base(OLD, SIZE)})
    if reason:
        assert point == Checkpoint("nas", NEW, None, "invalid", f"the bitmap {name} {said}")
    else:
        assert point == Checkpoint("nas", NEW, OLD, "reuse", "", SIZE)


@pytest.mark.parametrize("change", [None, {"recording": True}, {"inconsistent": True}], ids=str)
def test_a_bitmap_without_its_companion_is_no_base(change: dict[str, Any] | None) -> None:
    companion = () if change is None else (COMPANION | change,)
    point = starting_point(_disk(GOOD, *companion), "nas", NEW, {"vda": Base(OLD, SIZE)})
    assert (point.base, point.status) == (None, "invalid")
    assert "resizes" in point.reason


@given(size=st.integers(1, 1 << 43), lower=st.integers(0, 1 << 43), now=st.integers(0, 1 << 43))
def test_all_that_a_resize_may_have_changed_lies_behind_the_low_water_mark(size: int, lower: int, now: int) -> None:
    """Cut to `lower`, then grown or cut to `now`: QEMU keeps the bits of the clusters that begin before the end."""
    lowest = min(size, lower, now)
    left = -(-lowest // GRANULARITY) * GRANULARITY
    found = low_water(COMPANION | {"count": left}, size)
    assert found is not None
    if left < size:
        assert found <= lowest
        assert lowest - found <= GRANULARITY
    else:
        assert found == size, "nothing, or less than a cluster, was cut off"


def test_without_a_committed_base_a_bitmap_that_is_there_means_nothing() -> None:
    point = starting_point(_disk(GOOD, COMPANION), "nas", NEW, {})
    assert (point.base, point.status) == (None, "new")


def test_a_bitmap_is_ours_by_its_whole_name() -> None:
    names = ["foreign", "nas", f"nas-{OLD}", "qfsbackup-nas-", f"qfsbackup-nasx{OLD}", f"qfsbackup-nas-{OLD}x"]
    names += [f"qfsbackup-nas-{OLD[1:]}", f"qfsbackup-nas-{OLD}.lower", f"qfsbackup-{OLD}", "qfsbackup-low-water"]
    ours = [bitmap_name("nas", OLD), low_name(bitmap_name("nas", OLD)), bitmap_name(f"nas-{OTHER}", OLD)]
    found = list(bitmaps_of([_node(tuple({"name": name} for name in [*names, *ours]))]))
    assert [bitmap.name for bitmap in found] == ours
    assert [(bitmap.target, bitmap.generation) for bitmap in found] == [("nas", OLD)] * 2 + [(f"nas-{OTHER}", OLD)]


def _disk(*bitmaps: Mapping[str, Any]) -> GraphDisk:
    return GraphDisk("vda", "/machine/vda", "virtio-blk-device", False, False, (_node(bitmaps),))


def _node(bitmaps: tuple[Mapping[str, Any], ...]) -> Node:
    return Node("vda-node", "qcow2", SIZE, False, "/vda.qcow2", {}, bitmaps)
