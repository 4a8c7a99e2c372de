# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's requests, answered from the tree; the one place where an error becomes an errno.

The tree cannot be changed: EROFS for all that would, but for a punched hole. Whatever nobody foresaw is logged with its
traceback and answered with EIO, so that one bad request never ends the mount.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio

from qfsbackup.errors import FsError
from qfsbackup.facts import Sockets
from qfsbackup.fs.control import GIVE, Control
from qfsbackup.fs.inodes import is_chunk
from qfsbackup.fs.maps import MapFile
from qfsbackup.fs.node import Attributes, Directory, File, Handle, Node
from qfsbackup.fs.tree import Tree
from qfsbackup.fuse import _ops
from qfsbackup.fuse._ops import Answer
from qfsbackup.fuse.read_only import ReadOnly

log = logging.getLogger(__name__)

PUNCH_HOLE = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE (linux/falloc.h)
IOCTL_DONE = bytes(16)  # struct fuse_ioctl_out (linux/fuse.h): it returns 0
BLOCK = 4096  # bytes
FOREVER = 3600.0  # seconds that the kernel may keep what never changes

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Permissions:
    """Whose the files are. `mode` overrides the permission bits of files; folders get x where files get r.

    `read_only`: nobody has w, and nothing can be punched.
    """

    uid: int = 0
    gid: int = 0
    mode: int | None = None
    read_only: bool = False

    def mode_of(self, attributes: Attributes) -> int:
        """File type and permission bits as st_mode has them."""
        writers = 0o000 if self.read_only else 0o222
        if attributes.writable:
            return stat.S_IFREG | 0o400 | 0o200 & writers
        if not attributes.directory:
            default = 0o600 if attributes.punchable else 0o400
            return stat.S_IFREG | (default if self.mode is None else self.mode) & (0o555 | writers)
        read = 0o400 if self.mode is None else self.mode & 0o444
        return stat.S_IFDIR | read | read >> 2


def answered(
    handler: Callable[Concatenate[Operations, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Operations, P], Coroutine[Any, Any, R]]:
    """Turn what a handler raises into what pyfuse3 hands to the kernel."""

    @functools.wraps(handler)
    async def wrapper(self: Operations, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(self, *args, **kwargs)
        except FsError as error:
            log.debug("%s: %s", handler.__name__, error)
            raise pyfuse3.FUSEError(error.errno) from None
        except pyfuse3.FUSEError:
            raise
        except Exception:
            log.exception("%s failed", handler.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from None

    return wrapper


class Operations(ReadOnly):
    """`root` is the tree. What `sockets` receive while a read is waited for is looked at without the event loop."""

    def __init__(self, root: Tree, permissions: Permissions, sockets: Sockets) -> None:
        super().__init__()
        self._permissions = permissions
        self._tasks: trio.Nursery  # as long as the kernel may be answered
        self._root = root
        self._nodes: dict[int, Node] = {pyfuse3.ROOT_INODE: root}
        self._handles: dict[int, Handle] = {}
        self._next_handle = 0
        self._working = 0  # tasks that will answer a request
        _ops.install(self._fallocate, self._ioctl, self._lseek, self._defect, self._handles, sockets)

    async def serve(self) -> None:
        """Answer the kernel until it ends the session. Cancelled, it has no request left that it would still answer."""
        try:
            async with trio.open_nursery() as self._tasks:
                try:
                    await pyfuse3.main()
                finally:
                    self._tasks.cancel_scope.cancel()
        finally:
            _ops.end()

    def _entry(self, attributes: Attributes) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = attributes.inode
        entry.st_mode = self._permissions.mode_of(attributes)
        entry.st_nlink = 2 if attributes.directory else 1
        entry.st_uid, entry.st_gid = self._permissions.uid, self._permissions.gid
        entry.st_size, entry.st_blocks = attributes.size, attributes.blocks
        entry.st_blksize = 1 << 20  # the largest request that FUSE sends
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = attributes.time
        entry.entry_timeout = FOREVER
        entry.attr_timeout = 0.0 if attributes.live else FOREVER
        return entry

    async def _attributes(self, node: Node) -> Attributes:
        """Whatever others want is not held up while a large map is measured."""
        if isinstance(node, MapFile) and not node.is_measured:
            await trio.to_thread.run_sync(node.measure, abandon_on_cancel=True)  # an unmount does not wait
        return node.attributes()

    async def _remember(self, node: Node) -> pyfuse3.EntryAttributes:
        attributes = await self._attributes(node)
        if not is_chunk(attributes.inode):
            self._nodes[attributes.inode] = node
        return self._entry(attributes)

    def _node(self, inode: int) -> Node:
        return self._root.chunk(inode) or self._nodes[inode]

    def _directory(self, inode: int) -> Directory:
        node: Any = self._node(inode)
        if not node.attributes().directory:
            raise FsError(errno.ENOTDIR, f"inode {inode} is not a folder")
        return node  # type: ignore[no-any-return]

    @answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        node = self._directory(parent_inode).lookup(os.fsdecode(name))
        if node is None:
            raise FsError(errno.ENOENT, f"no entry {name!r}")
        return await self._remember(node)

    @answered
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._entry(await self._attributes(self._node(inode)))

    @answered
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        self._directory(inode)
        return pyfuse3.FileHandleT(inode)

    @answered
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        for number, (name, node) in enumerate(self._directory(fh).entries(start_id), start_id + 1):
            if not pyfuse3.readdir_reply(token, os.fsencode(name), await self._remember(node), number):
                return

    @answered
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        node: Any = self._node(inode)
        file: File = node
        attributes = file.attributes()
        # A disk is opened for writing even where its server cannot trim: then the punch says that, not the open.
        changeable = attributes.punchable is not None or attributes.writable
        if flags & os.O_ACCMODE != os.O_RDONLY and (self._permissions.read_only or not changeable):
            raise FsError(errno.EROFS, f"inode {inode} can neither be written nor punched")
        if flags & os.O_TRUNC and not attributes.writable:
            raise FsError(errno.EROFS, "a snapshot cannot be truncated")
        self._next_handle += 1
        self._handles[self._next_handle] = file.open()
        return pyfuse3.FileInfo(fh=self._next_handle, direct_io=True, keep_cache=False)

    @answered
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        handle = self._handles[fh]
        if not isinstance(handle, Control):
            raise FsError(errno.EROFS, "a snapshot cannot be written")
        return await handle.write(buf)

    @answered
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """`echo commit > control` truncates first."""
        attributes = self._node(inode).attributes()
        if not attributes.writable or not fields.update_size:
            raise FsError(errno.EROFS, "a snapshot cannot be changed")
        return self._entry(attributes)

    @answered
    async def release(self, fh: int) -> None:
        await self._handles.pop(fh).close()

    @answered
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """As large as the disks, and full: what df shows of any read-only file system."""
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = BLOCK
        answer.f_blocks = -(-self._root.disks_size // BLOCK)
        answer.f_namemax = 255
        return answer

    def _lseek(self, answer: Answer, fh: int, offset: int, whence: int) -> None:
        try:
            answer(self._handles[fh].seek(offset, whence))
        except FsError as error:
            answer(error)

    def _fallocate(self, answer: Answer, fh: int, mode: int, offset: int, length: int) -> None:
        if mode == PUNCH_HOLE:
            self._start(answer, partial(self._handles[fh].punch, offset, length))
        else:
            answer(FsError(errno.EOPNOTSUPP, f"fallocate with mode {mode}"))

    def _ioctl(self, answer: Answer, fh: int, command: int, content: bytes) -> None:
        handle = self._handles[fh]
        if command == GIVE and isinstance(handle, Control):
            self._start(answer, partial(self._give, handle, content))
        else:
            answer(FsError(errno.ENOTTY, f"ioctl {command}"))

    async def _give(self, control: Control, words: bytes) -> bytes:
        await control.write(words)
        return IOCTL_DONE

    def _defect(self, error: Exception) -> None:
        """A request raised, and gets EIO: it is its own affair."""
        log.error("a request failed", exc_info=error)

    def _start(self, answer: Answer, work: Callable[[], Awaitable[bytes | None]]) -> None:
        self._works(1)
        self._tasks.start_soon(self._answer, answer, work)

    def _works(self, more: int) -> None:
        """So many tasks more work; as long as there is one, it needs the event loop."""
        self._working += more
        _ops.needs_loop(self._working > 0)

    async def _answer(self, answer: Answer, work: Callable[[], Awaitable[bytes | None]]) -> None:
        """Do the work and answer; one that is cancelled gets EIO."""
        try:
            answer(await work())
        except FsError as error:
            log.debug("%s", error)
            answer(error)
        except Exception:
            log.exception("a request failed")
        finally:
            self._works(-1)
            answer(FsError(errno.EIO, "it was not done"))  # which counts where there was no answer
