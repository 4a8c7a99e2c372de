# SPDX-License-Identifier: LGPL-2.1-or-later
"""delta/ goes through the tools that know holes; over the image of the base it gives the image of the instant."""

import shlex
from pathlib import Path

import pytest

from tests.harness.files import allocated, assert_same, data_extents
from tests.harness.mount import aside, command
from tests.harness.qemu import Qemu
from tests.incremental.support import CHUNK, SIZE, bed
from tests.vm.support import guest_io

CARRIERS = {
    "cp": "cp delta/vda.raw {out}",
    "cp --sparse=always": "cp --sparse=always delta/vda.raw {out}",
    "tar -S": "tar -cSf - -C delta vda.raw | tar -xSf - -C {folder} && mv {folder}/vda.raw {out}",
    "rsync -S": "rsync -S delta/vda.raw {out}",
    "qemu-img convert": "qemu-img convert -f raw -O raw delta/vda.raw {out}",
}
KEEPS_ZEROS_AS_DATA = {"tar -S"}  # the others make a hole of a run of zeros: then the map says what to write


def apply(copy: Path, extents: list[tuple[int, int]], image: Path) -> None:
    """Write these (offset, length) of the delta over an image."""
    with copy.open("rb") as source, image.open("r+b") as sink:
        for offset, length in extents:
            source.seek(offset)
            sink.seek(offset)
            sink.write(source.read(length))


@pytest.mark.one_qemu
async def test_a_delta_is_carried_and_applied(qemu: Qemu, tmp_path: Path) -> None:
    async with bed(qemu, tmp_path) as lab:
        await lab.committed("nas")
        old = await lab.disk("vda", tmp_path / "old.raw")
        await guest_io(lab.vm, "vda", f"write -P 1 {CHUNK + 100 * 512} 512")
        await guest_io(lab.vm, "vda", f"write -P 2 {SIZE - 512} 512")
        await guest_io(lab.vm, "vda", f"write -z {4 * CHUNK} {2 * CHUNK}")  # there was data
        await guest_io(lab.vm, "vda", f"discard {8 * CHUNK} {CHUNK}")
        new = await lab.disk("vda", tmp_path / "new.raw")
        dirty = 5 * CHUNK
        (tmp_path / "tar").mkdir()
        async with lab.mounted("nas") as mount:
            assert (await aside((mount.path / "delta/vda.raw").stat)).st_size == SIZE
            assert (await aside((mount.path / "delta/vda.raw").stat)).st_blocks * 512 == dirty
            extents = await aside(data_extents, mount.path / "delta/vda.raw")
            assert extents == [(CHUNK, CHUNK), (4 * CHUNK, 2 * CHUNK), (8 * CHUNK, CHUNK), (SIZE - CHUNK, CHUNK)]
            for name, line in CARRIERS.items():
                out = tmp_path / "carried"
                script = line.format(out=shlex.quote(str(out)), folder=shlex.quote(str(tmp_path / "tar")))
                done = await command("/bin/sh", "-c", script, cwd=mount.path)
                assert done.code == 0, (name, done)
                assert out.stat().st_size == SIZE, name
                assert allocated(out) <= dirty, name
                await aside(assert_same, out, mount.path / "delta/vda.raw")
                image = tmp_path / "applied.raw"
                image.write_bytes(old.read_bytes())
                apply(out, data_extents(out) if name in KEEPS_ZEROS_AS_DATA else extents, image)
                assert_same(image, new)
                out.unlink()
            await aside(assert_same, mount.image("vda"), new)


@pytest.mark.one_qemu
async def test_without_a_base_the_delta_is_the_disk(qemu: Qemu, tmp_path: Path) -> None:
    async with bed(qemu, tmp_path) as lab, lab.mounted("nas") as mount:
        for disk in ("vda", "vdb"):
            await aside(assert_same, mount.path / f"delta/{disk}.raw", await lab.disk(disk, tmp_path / "now"))
            assert await aside(data_extents, mount.path / f"delta/{disk}.raw") == [(0, SIZE)]
