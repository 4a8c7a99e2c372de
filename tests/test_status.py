# SPDX-License-Identifier: LGPL-2.1-or-later
"""The live figures: what is remembered of figures that go down again, and that a broken snapshot stays broken."""

from qfsbackup.status import DiskStatus, FleecingLook, Status


def test_the_peak_of_the_fleecing_files_is_over_all_disks_at_once() -> None:
    status = Status(disks={"vda": DiskStatus(100), "vdb": DiskStatus(100)})
    seen = []
    for vda, vdb in ((10, 0), (6, 7), (0, 11), (0, 0)):
        status.note(FleecingLook({"vda": vda, "vdb": vdb}, lost=(), free=1000))
        fleecing = status.as_dict()["fleecing"]
        assert isinstance(fleecing, dict)
        seen.append((fleecing["used"], fleecing["peak"]))
    assert seen == [(10, 10), (13, 13), (11, 13), (0, 13)]


def test_the_first_reason_why_a_snapshot_broke_stays() -> None:
    status = Status()
    status.health.mark_broken("first")
    status.health.mark_broken("second")
    assert (status.as_dict()["state"], status.as_dict()["broken"]) == ("broken", "first")
