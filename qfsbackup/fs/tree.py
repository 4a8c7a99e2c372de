# SPDX-License-Identifier: LGPL-2.1-or-later
"""What people see under the mountpoint, built once for a snapshot.

    vm.json  images/<disk>.raw  delta/<disk>.raw  chunks/<disk>/NNN/NNNNNNNN  maps/<disk>.{txt,json,borgmap,base}
    config/*  .qfsbackup/{status.json,control}

Times are the mount's, or older where a disk has not changed since: never `now`, which makes every tool think that the
file changes while it is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from qfsbackup.backup.names import file_name
from qfsbackup.contracts import Snapshot
from qfsbackup.fs import maps
from qfsbackup.fs.chunks import ChunkedDisk
from qfsbackup.fs.control import ControlFile
from qfsbackup.fs.delta import Delta
from qfsbackup.fs.description import Look, describe_base
from qfsbackup.fs.folder import Folder
from qfsbackup.fs.frozen import FrozenDisk
from qfsbackup.fs.grid import Grid, cut
from qfsbackup.fs.inodes import Kind, Top, inode, parts
from qfsbackup.fs.node import File, Node
from qfsbackup.fs.text import FixedFile, LiveFile
from qfsbackup.fs.window import Window
from qfsbackup.ranges import RangeSet
from qfsbackup.status import Status

BASE = 3  # the number of maps/<disk>.base among a disk's maps


@dataclass(frozen=True, slots=True)
class ShownDisk:
    """A disk on its way into the tree: `number` is stable for the VM, whatever other disks come and go."""

    name: str
    number: int
    frozen: FrozenDisk
    grid: Grid | None = None  # None: no target, so all of it has the time of the mount


class Tree(Folder):
    """The root folder, which also finds chunks: they are too many for the kernel side to remember them."""

    def __init__(
        self, time: int, entries: Mapping[str, Node], service: Folder, chunked: Mapping[int, ChunkedDisk]
    ) -> None:
        """`chunked` by the disk's number."""
        super().__init__(Top.ROOT, time, entries, hidden={".qfsbackup": service})
        self._chunked = chunked
        self.disks_size = sum(view.disk.size for view in chunked.values())

    def chunk(self, inode: int) -> File | None:
        """The chunk with this inode."""
        disk, kind, number = parts(inode)
        view = self._chunked.get(disk) if kind == Kind.CHUNK and disk is not None else None
        return view.chunk(number) if view else None


def build_tree(
    snapshot: Snapshot, disks: Sequence[ShownDisk], status: Status, description: bytes, look: Look | None = None
) -> Tree:
    """The root folder; `description` is the content of vm.json. Without `look`, all times are the instant."""
    look = look or Look(snapshot.instant, snapshot.instant)
    time = look.time

    def folder(top: Top, entries: Mapping[str, Node]) -> Folder:
        return Folder(inode(Kind.TOP, None, top), time, entries)

    def live_status() -> bytes:
        return (json.dumps(status.as_dict(), indent=2) + "\n").encode()

    chunked = {disk.number: _chunks(disk, look) for disk in disks}
    images = folder(Top.IMAGES, {f"{file_name(disk.name)}.raw": _image(disk, time) for disk in disks})
    bases = dict(_bases(snapshot, disks, look))
    entries: dict[str, Node] = {
        "vm.json": FixedFile(inode(Kind.TOP, look.number, Top.DESCRIPTION), look.newest, description),
        **({"images": images} if look.images else {}),
        "chunks": folder(Top.CHUNKS, {file_name(disk.name): chunked[disk.number] for disk in disks}),
        "delta": folder(Top.DELTA, {f"{file_name(disk.name)}.raw": _delta(disk, time) for disk in disks}),
        "maps": folder(Top.MAPS, dict(entry for disk in disks for entry in _maps(disk, time)) | bases),
        "config": folder(Top.CONFIG, dict(_config(snapshot.config, look))),
    }
    service: dict[str, Node] = {"status.json": LiveFile(inode(Kind.TOP, None, Top.STATUS), time, live_status)}
    if look.words:
        service["control"] = ControlFile(inode(Kind.TOP, None, Top.CONTROL), time, look.words)
    return Tree(time, entries, folder(Top.SERVICE, service), chunked)


def _image(disk: ShownDisk, time: int) -> File:
    """It changed when one of its chunks did."""
    changed = disk.grid.newest() if disk.grid and disk.grid.times else time
    return Window(disk.frozen, inode(Kind.IMAGE, disk.number, 0), changed, 0, disk.frozen.size)


def _delta(disk: ShownDisk, time: int) -> File:
    return Delta(disk.frozen, inode(Kind.DELTA, disk.number, 0), time)


def _chunks(disk: ShownDisk, look: Look) -> ChunkedDisk:
    grid = disk.grid or cut(disk.frozen.size, RangeSet(), look.time)
    return ChunkedDisk(disk.frozen, disk.number, grid, look.time, release=look.release)


def _bases(snapshot: Snapshot, disks: Sequence[ShownDisk], look: Look) -> Iterator[tuple[str, File]]:
    numbers = {disk.name: disk.number for disk in disks}
    for disk in snapshot.disks:
        number = inode(Kind.MAP, numbers[disk.name], BASE)
        yield f"{file_name(disk.name)}.base", FixedFile(number, look.time, describe_base(snapshot, disk, look))


def _maps(disk: ShownDisk, time: int) -> Iterator[tuple[str, File]]:
    name, dirty, size = file_name(disk.name), disk.frozen.dirty, disk.frozen.size
    inodes = (inode(Kind.MAP, disk.number, number) for number in range(3))
    yield f"{name}.txt", maps.MapFile(next(inodes), time, dirty, size, maps.text_line)
    yield f"{name}.json", maps.MapFile(next(inodes), time, dirty, size, maps.json_line, ends=maps.JSON_ENDS)
    states = maps.borg_states(disk.frozen.allocated)
    yield f"{name}.borgmap", maps.MapFile(next(inodes), time, dirty, size, maps.borg_line, states=states)


def _config(files: Mapping[str, bytes], look: Look) -> Iterator[tuple[str, File]]:
    for number, (name, content) in enumerate(sorted(files.items())):
        yield file_name(name), FixedFile(inode(Kind.CONFIG, look.number, number), look.time, content)
