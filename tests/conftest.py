# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fixtures shared by all tests. A test that takes `qemu` runs once with every QEMU that QEMU (the variable) selects."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qfsbackup.errors import UserError
from qfsbackup.vm.recipes import RECIPES
from tests.e2e.support import idle_vm
from tests.harness.chunk_set import CHUNK, cut, describe, make_content
from tests.harness.disk import MIB, Disk
from tests.harness.qemu import Qemu, newest, selected
from tests.harness.vm import Vm, running_vm


def pytest_configure(config: pytest.Config) -> None:
    """Make known the marks of the test bed."""
    config.addinivalue_line("markers", "newest_too: with Debian's newest QEMU, too, where it is here and all are meant")
    config.addinivalue_line("markers", "recipes(NAME...): these, with each QEMU that can do them")
    config.addinivalue_line("markers", "one_qemu: not about QEMU's behaviour, so the newest one selected is enough")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Fixture `qemu`: one build of QEMU; with `recipe`, the name of one that it can do."""
    if "qemu" in metafunc.fixturenames:
        builds = selected()
        if metafunc.definition.get_closest_marker("one_qemu"):
            builds = builds[-1:]
        if metafunc.definition.get_closest_marker("newest_too"):
            builds += newest()
        if "recipe" in metafunc.fixturenames:
            marked = metafunc.definition.get_closest_marker("recipes")
            names = marked.args if marked else tuple(RECIPES)
            pairs = [(qemu, name) for qemu in builds for name in names if can_do(qemu, name)]
            metafunc.parametrize(("qemu", "recipe"), pairs, ids=str)
        else:
            metafunc.parametrize("qemu", builds, ids=str)


def can_do(qemu: Qemu, recipe: str) -> bool:
    """Does a mount with this recipe not refuse this QEMU."""
    try:
        RECIPES[recipe].check(qemu.version)
    except UserError:
        return False
    return True


@pytest.fixture
async def paused_vm(qemu: Qemu, tmp_path: Path) -> AsyncIterator[Vm]:
    """A VM whose CPUs never run, with a raw disk `vda` and a qcow2 disk `vdb` of 16 MiB, both empty."""
    disks = [Disk("vda", tmp_path / "vda.raw", 16 * MIB), Disk("vdb", tmp_path / "vdb.qcow2", 16 * MIB, format="qcow2")]
    async with running_vm(qemu, tmp_path, disks) as vm:
        yield vm


@pytest.fixture
async def guest_vm(qemu: Qemu, tmp_path: Path) -> AsyncIterator[Vm]:
    """A booted guest with its agent and the same disks as `paused_vm`, of 64 MiB: /dev/vda and /dev/vdb."""
    disks = [Disk("vda", tmp_path / "vda.raw"), Disk("vdb", tmp_path / "vdb.qcow2", format="qcow2")]
    async with running_vm(qemu, tmp_path, disks, guest=True, agent=True) as vm:
        yield vm


@pytest.fixture
async def vm(qemu: Qemu, tmp_path: Path) -> AsyncIterator[Vm]:
    """A running VM whose mount, if a test leaves one, is taken away."""
    async with idle_vm(qemu, tmp_path) as vm:
        yield vm


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A mountpoint."""
    path = tmp_path / "mnt"
    path.mkdir()
    return path


@pytest.fixture
def chunks(tmp_path: Path) -> Path:
    """Five chunks, the last of them short, with a vm.json that says so."""
    content = make_content(4 * CHUNK + 1536, [(10, 5000), (2 * CHUNK, 4 * CHUNK + 1536)])
    describe(tmp_path, size=len(content))
    (tmp_path / "expected").write_bytes(content)
    return cut(tmp_path / "chunks" / "vda", content)
