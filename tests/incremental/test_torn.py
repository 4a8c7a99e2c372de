# SPDX-License-Identifier: LGPL-2.1-or-later
"""A copy that a tool left half-way is told from a whole one, and maps and deltas say what they apply on."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness.files import assert_same
from tests.harness.mount import Mount, aside, command, mounted, qfsbackup
from tests.harness.qemu import Qemu
from tests.incremental.support import CHUNK, Bed, bed, chunk_names
from tests.incremental.tools import Rsync
from tests.vm.support import guest_io

pytestmark = pytest.mark.one_qemu


async def copy_some(lab: Bed, tool: Rsync, *names: str) -> None:
    """rsync dies when it has copied these."""
    async with lab.mounted(tool.name) as mount:
        done = await command("rsync", "-aR", *names, f"{tool.copy}/", cwd=mount.path)
        assert done.code == 0, done


async def test_a_copy_of_two_instants_is_refused_and_the_chunks_are_named(qemu: Qemu, tmp_path: Path) -> None:
    tool = Rsync(tmp_path)
    async with bed(qemu, tmp_path) as lab:
        await tool.setup()
        await lab.backup(tool)
        whole = await lab.disk("vda", tmp_path / "first")
        await guest_io(lab.vm, "vda", f"write -P 1 {3 * CHUNK} 64k")
        await guest_io(lab.vm, "vda", f"write -P 2 {7 * CHUNK} 64k")
        words: list[str | Path] = ["restore", tool.copy / "chunks/vda", tmp_path / "disk.raw"]
        assert (await qfsbackup(*words)).code == 0
        await aside(assert_same, tmp_path / "disk.raw", whole)
        await copy_some(lab, tool, *chunk_names("vda", [3]))
        (await qfsbackup(*words, "--force")).refused(2, "1 of the 32 chunks", "vm.json: 000/00000003")
        await copy_some(lab, tool, *chunk_names("vda", [3]), "vm.json")
        (await qfsbackup(*words, "--force")).refused(2, "1 of the 32 chunks", "vm.json: 000/00000007")
        await aside(assert_same, tmp_path / "disk.raw", whole)
        assert (await qfsbackup(*words, "--force", "--torn")).code == 0
        await lab.backup(tool)
        done = await qfsbackup(*words, "--force")
        assert done.code == 0
        assert "cannot be known" not in done.stderr
        await aside(assert_same, tmp_path / "disk.raw", await lab.disk("vda", tmp_path / "second"))


async def base(mount: Mount, disk: str) -> dict[str, str]:
    """What maps/<disk>.base says; its own generation must be vm.json's."""
    text = await aside((mount.path / f"maps/{disk}.base").read_text)
    found = dict(line.split(" ", 1) for line in text.splitlines())
    description = await of_disk(mount, disk)
    assert found["generation"] == (description["generation"] or "none")
    assert found["base"] == (description["base"] or "none")
    assert found["base_instant"] == (description["base_instant"] or "none")
    return found


async def of_disk(mount: Mount, disk: str) -> dict[str, Any]:
    """Its entry in vm.json."""
    [entry] = [entry for entry in (await mount.json("vm.json"))["disks"] if entry["name"] == disk]
    found: dict[str, Any] = entry
    return found


async def test_maps_and_deltas_say_what_they_apply_on(qemu: Qemu, tmp_path: Path) -> None:
    async with bed(qemu, tmp_path) as lab:
        async with mounted(lab.qmp, lab.mountpoint) as mount:
            nothing = await base(mount, "vda")
            assert (nothing["target"], nothing["generation"], nothing["base"]) == ("none", "none", "none")
        async with lab.mounted("nas") as mount:
            first = await base(mount, "vda")
            assert (first["target"], first["base"], first["base_instant"]) == ("nas", "none", "none")
            await lab.commit()
        async with lab.mounted("nas") as mount:
            second = await base(mount, "vda")
            assert (second["base"], second["base_instant"]) == (first["generation"], first["instant"])
        async with lab.mounted("nas") as mount:  # the second was not committed
            third = await base(mount, "vda")
            assert third["base"] == first["generation"]
            assert third["generation"] != second["generation"]
            assert third["instant"] == (await mount.json("vm.json"))["instant"]


async def test_vm_json_has_the_time_of_every_chunk_and_its_own(qemu: Qemu, tmp_path: Path) -> None:
    """With a target and without; the copy that `cp -a` makes is then known to be whole."""
    async with bed(qemu, tmp_path) as lab:
        for options in ([], [lab.options("nas")]):
            copy = tmp_path / f"copy{len(options)}"
            copy.mkdir()
            async with mounted(lab.qmp, lab.mountpoint, *options) as mount:
                done = await command("cp", "-a", "chunks", "vm.json", copy, cwd=mount.path)
                assert done.code == 0, done
            description = json.loads((copy / "vm.json").read_text())
            assert description["mtime"] == int((copy / "vm.json").stat().st_mtime)
            assert description["target"] == ("nas" if options else None)
            done = await qfsbackup("restore", copy / "chunks/vda", tmp_path / "disk.raw", "--force")
            assert (done.code, "cannot be known" in done.stderr) == (0, False), done
