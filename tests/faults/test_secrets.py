# SPDX-License-Identifier: LGPL-2.1-or-later
"""A VM's disk is a secret: another user gets at it nowhere. And names that QEMU tells cannot escape the tree."""

import json
import os
import re
import stat
from pathlib import Path

import pytest

from tests.e2e.support import idle_vm, runtime_folder
from tests.faults.support import reads
from tests.harness.disk import MIB
from tests.harness.files import make_random
from tests.harness.mount import as_user, aside, command, mounted, qfsbackup
from tests.harness.nbd_server import storage_daemon
from tests.harness.qemu import Qemu
from tests.harness.vm import Vm
from tests.vm.support import guest_io

pytestmark = pytest.mark.one_qemu

NOBODY = 65534


def open_to_all(folder: Path) -> None:
    """Let everybody enter the test's folder, so that only what the product does keeps them out."""
    for path in (folder, *folder.parents):
        if path.stat().st_uid == os.getuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o011)


def fleecing_files(vm: Vm, folder: Path) -> list[Path]:
    """QEMU's descriptors of nameless files in `folder`."""
    entries = Path(f"/proc/{vm.pid}/fd").iterdir()
    links = {entry: os.readlink(entry) for entry in entries}  # noqa: PTH115 - what they name is gone
    return [entry for entry, link in links.items() if str(folder) in link and link.endswith("(deleted)")]


async def test_another_user_gets_at_nothing(qemu: Qemu, tmp_path: Path) -> None:
    state, fleece = tmp_path / "state", tmp_path / "fleece"
    fleece.mkdir()
    state.mkdir(mode=0o700)
    async with idle_vm(qemu, tmp_path) as vm:
        options = f"fleece={fleece},target=nas,state={state}"
        async with mounted(vm.qmp, tmp_path / "mnt", options) as mount:
            await guest_io(vm, "vda", "write -P 7 0 64k")
            await aside((mount.path / ".qfsbackup/control").write_text, "commit\n")
            open_to_all(tmp_path)
            assert (await command(*as_user(NOBODY, "test", "-x", tmp_path))).code == 0  # the check can fail
            files = fleecing_files(vm, fleece)
            secrets = [mount.path, mount.image("vda"), state, *state.iterdir(), runtime_folder(vm), *files]
            assert len(secrets) >= 7
            for secret in secrets:
                for words in (["ls", secret], ["cat", secret], ["stat", f"{secret}/."]):
                    done = await command(*as_user(NOBODY, *words))
                    assert done.code != 0, done
                    assert "Permission denied" in done.stderr, done
            assert list(fleece.iterdir()) == []
            for file in files:
                assert stat.S_IMODE(file.stat().st_mode) == 0o600
            connect = f"nbd+unix:///qfsbackup-0?socket={runtime_folder(vm)}/nbd.sock"
            assert "Permission denied" in (await command(*as_user(NOBODY, "nbdinfo", connect))).stderr


HOSTILE = ["../../etc", "a/b", "..", ".", "tab\tline\nbell\a", "\u202egnol", "%2E%2E", "-rf", "n" * 255]


async def test_names_that_an_nbd_server_makes_up_stay_in_the_tree(qemu: Qemu, tmp_path: Path) -> None:
    image = make_random(tmp_path / "image", MIB)
    node = {"driver": "file", "node-name": "node", "filename": str(image), "read-only": True}
    options = ["--blockdev", json.dumps(node)]
    for number, name in enumerate(HOSTILE):
        export = {"type": "nbd", "id": f"e{number}", "node-name": "node", "name": name}
        options += ["--export", json.dumps(export)]
    async with (
        storage_daemon(qemu, tmp_path, options) as server,
        mounted(server.uri, tmp_path / "mnt") as mount,
    ):
        names = await aside(os.listdir, mount.path / "images")
        assert len(set(names)) == len(HOSTILE)
        for name in names:
            assert re.fullmatch(r"[A-Za-z0-9%_.~+@:=,-]+\.raw", name), name
            assert not name.startswith(".")
            assert await reads(mount.path / "images" / name) == image.read_bytes()
        found = await aside(lambda: [path for path in mount.path.rglob("*") if not path.is_relative_to(mount.path)])
        assert found == []
        described = {disk["name"] for disk in (await mount.json("vm.json"))["disks"]}
        assert described == set(HOSTILE)
        said = (await qfsbackup("status", mount.path)).stdout
        assert len(said.splitlines()) == 3 + len(HOSTILE)
        assert all(line.isprintable() for line in said.splitlines())
        assert r"  tab\tline\nbell\x07: 1 MiB" in said
        (tmp_path / "none").mkdir()
        done = await qfsbackup("mount", server.uri, tmp_path / "none", "-o", "disks=none")
        done.refused(1, "no disk none")
        assert all(line.isprintable() for line in done.stderr.splitlines())
        assert r"tab\tline\nbell\x07" in done.stderr
