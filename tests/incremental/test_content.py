# SPDX-License-Identifier: LGPL-2.1-or-later
"""A chain belongs to a disk's content, not to its name: after each of these events what a tool holds after the next
backup is the disk, byte for byte, and where the content may be another's, the backup is full and says why.
"""

from pathlib import Path

import pytest

from tests.harness.qemu import Qemu
from tests.incremental.chain_lab import Event, chain_lab, said
from tests.incremental.image_events import IMAGES
from tests.incremental.names_events import NAMES


@pytest.mark.parametrize("happens", [*NAMES, *IMAGES], ids=lambda case: case.__name__)
async def test_what_is_held_after_it_is_the_disk_itself(qemu: Qemu, tmp_path: Path, happens: Event) -> None:
    async with chain_lab(qemu, tmp_path) as lab:
        expected = await happens(lab)
        for disk in expected:
            await lab.write(disk, "write -P 9 192k 64k")
        found = said(await lab.backup())
        assert found.keys() == expected.keys()
        assert all(words in found[disk] for disk, words in expected.items()), found
        for disk in expected:
            await lab.write(disk, "write -P 10 0 64k")
        assert said(await lab.backup()) == dict.fromkeys(expected, "reuse")
