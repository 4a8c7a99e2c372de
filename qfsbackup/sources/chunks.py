# SPDX-License-Identifier: LGPL-2.1-or-later
"""The source `chunks:FOLDER`: a backup, restored or mounted by the tool that made it, is disks again, without a copy.

The folder is a backup's, or the chunks/ in it, or one disk's folder there. What is not all there, or not of one backup,
is refused as `restore` does. There is no VM: nothing is frozen, nothing is left behind.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from qfsbackup.backup.backup import Backup, find_backup
from qfsbackup.backup.chunk_set import ChunkSet
from qfsbackup.contracts import Mounting, Snapshot, SnapshotDisk, Source
from qfsbackup.errors import EXIT_USAGE, UserError
from qfsbackup.options import Options

SCHEME = "chunks:"
LOOKING = 600.0  # seconds; below `restic mount` 65,536 chunks take 20, more where its repository is far away
READING = 60.0  # seconds for a read of one MiB


class ChunksSource(Source):
    """A folder; see contracts.Source."""

    kind = "a backup"

    def __init__(self, folder: Path) -> None:
        self.name = f"{SCHEME}{folder}"
        self.place = str(folder)
        self._folder = folder

    def check(self, options: Options) -> None:
        """See contracts.Source."""
        super().check(options)
        if options.bitmap:
            raise UserError("bitmap= is for an NBD URI", "Leave it out: a backup has no bitmaps.", EXIT_USAGE)
        if options.trim_server_data or options.discard == "release":
            hint = "Leave discard=release and trim-server-data out: nothing of a backup is given back."
            raise UserError("a backup cannot be trimmed", hint, EXIT_USAGE)
        if options.bwlimit:
            raise UserError("bwlimit= is for a VM and for an NBD server", "Leave it out here.", EXIT_USAGE)

    @asynccontextmanager
    async def snapshot(self, mounting: Mounting) -> AsyncIterator[Snapshot]:
        """The instant is the backup's own."""
        from qfsbackup.backup.disk import opened  # these two need trio
        from qfsbackup.backup.readers import readers

        options = mounting.options
        backup = await self._found(options)
        async with readers(READING, mounting.sockets) as threads:

            def disk(name: str, chunks: ChunkSet) -> SnapshotDisk:
                opening = partial(opened, name, chunks, backup.data[name], threads, mounting.status)
                return SnapshotDisk(name, chunks.size, opening)

            yield Snapshot(
                vm=options.vm or backup.vm,
                uuid=backup.uuid,
                instant=backup.instant,
                disks=tuple(disk(*found) for found in backup.disks.items()),
                frozen=backup.facts.get("frozen") is True,
                details={"source": self.name},
                config=backup.config,
            )

    async def _found(self, options: Options) -> Backup:
        from qfsbackup.patience import NoAnswerError, in_time  # needs trio

        try:
            return await in_time(partial(find_backup, self._folder, options.disks, options.exclude), LOOKING)
        except NoAnswerError as error:
            raise UserError(f"{self._folder}: {error}", "See whether its file system hangs.") from None


def source(text: str) -> ChunksSource:
    """The backup in this folder. Raises UserError."""
    folder = text.removeprefix(SCHEME)
    if not folder:
        raise UserError(
            "chunks: has no folder behind it", "Name the folder of a backup: chunks:/srv/restored", EXIT_USAGE
        )
    return ChunksSource(Path(folder).absolute())
