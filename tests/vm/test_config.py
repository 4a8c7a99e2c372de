# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is kept to rebuild a VM."""

import json
from pathlib import Path

from qfsbackup.vm.look.config import config_files
from qfsbackup.vm.monitors.qmp_socket import connect
from tests.harness.vm import UUID, Vm
from tests.vm.refusing import running_refusing


async def test_the_configuration_tells_how_to_rebuild_the_vm(paused_vm: Vm) -> None:
    async with connect(paused_vm.qmp, print) as qmp:
        files = await config_files(qmp)
    facts = json.loads(files["qemu.json"])
    assert facts["uuid"]["UUID"] == UUID
    assert "q35" in facts["machine-type"]
    assert UUID in facts["command-line"]
    assert {block["qdev"] for block in facts["block"]} == {
        "/machine/peripheral/vda/virtio-backend",
        "/machine/peripheral/vdb/virtio-backend",
    }
    assert facts["version"]["qemu"]["major"] == paused_vm.qemu.version[0]


async def test_what_qemu_does_not_tell_is_absent(paused_vm: Vm, tmp_path: Path) -> None:
    async with running_refusing(paused_vm.qmp, tmp_path / "refusing") as refusing:
        refusing.command("query-pci", 0)
        async with connect(refusing.path, print) as qmp:
            facts = json.loads((await config_files(qmp))["qemu.json"])
    assert refusing.refused == "query-pci"
    assert "pci" not in facts
    assert "block" in facts
