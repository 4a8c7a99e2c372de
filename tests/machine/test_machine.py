# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whatever happens to a VM, in whatever order: no copy is silently wrong, and nothing of ours is left.

By default a bounded share of what can happen, the same in every run. MACHINE=3600 goes on for so many seconds with each
QEMU and flavour, from a random seed on; MACHINE_SEED=N runs that seed alone. A failure prints its seed and its steps.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.harness.qemu import Qemu
from tests.machine.commands import serving
from tests.machine.foreign import ForeignJobs
from tests.machine.jobs import Jobs
from tests.machine.kills import Kills
from tests.machine.plugs import Plugs
from tests.machine.portal import open_portal
from tests.machine.power import Power
from tests.machine.world import Flavour
from tests.machine.writes import Writes

SHARE = 20.0  # seconds, by default
SETTINGS = settings(
    max_examples=3,
    stateful_step_count=25,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # to find shorter steps takes minutes
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)


class Machine(Kills, ForeignJobs, Writes, Power, Plugs, Jobs):
    """All rules."""


def machine_of(**facts: Any) -> type[Machine]:
    """The machine for these class variables of `Base`."""
    return type("Machine", (Machine,), facts)


def seeds() -> list[int]:
    """Enough of them, or the one that was asked for."""
    if "MACHINE_SEED" in os.environ:
        return [int(os.environ["MACHINE_SEED"])]
    first = random.randrange(10**9) if "MACHINE" in os.environ else 0
    return [first + number for number in range(10**6)]


@pytest.mark.timeout(float(os.environ.get("MACHINE", SHARE)) + 300)
@pytest.mark.parametrize("flavour", get_args(Flavour))
def test_no_backup_is_silently_wrong(qemu: Qemu, tmp_path_factory: pytest.TempPathFactory, flavour: Flavour) -> None:
    end = time.monotonic() + float(os.environ.get("MACHINE", SHARE))
    with open_portal() as portal, serving(tmp_path_factory.mktemp("machine") / "commands") as commands:
        machine = machine_of(qemu=qemu, flavour=flavour, portal=portal, commands=commands)
        for number in seeds():
            print(f"MACHINE_SEED={number}")
            run_state_machine_as_test(seed(number)(machine), settings=SETTINGS)
            if time.monotonic() > end:
                break


def test_what_is_skipped_is_what_did_not_change(qemu: Qemu, tmp_path: Path) -> None:
    """All of the above would also hold if every backup were a full one."""
    with open_portal() as portal, serving(tmp_path / "commands") as commands:
        machine = machine_of(qemu=qemu, flavour="blockdev", portal=portal, commands=commands)()
        try:
            tools = machine.tools["nas"]
            for chunks in (64, 2):
                before = tools.read
                machine.back_up("nas", committed=True)
                assert tools.read - before == chunks
                for number in range(2):
                    machine.write(number=number, where=0.5, units=1, kind="discard")
        finally:
            machine.teardown()
