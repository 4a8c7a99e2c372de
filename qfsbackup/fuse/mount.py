# SPDX-License-Identifier: LGPL-2.1-or-later
"""A tree at a mountpoint, for as long as an `async with` lasts.

pyfuse3 keeps its session in globals: one process, one mount.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import stat
from collections.abc import AsyncIterator, Set
from contextlib import asynccontextmanager
from pathlib import Path

import pyfuse3
import trio

from qfsbackup.at_work import held_by
from qfsbackup.errors import EXIT_SYSTEM, UserError
from qfsbackup.facts import Sockets
from qfsbackup.fs.tree import Tree
from qfsbackup.fuse import _ops
from qfsbackup.fuse.operations import Operations, Permissions
from qfsbackup.mounts import MOUNTINFO, detach_dead, find_mount, our_mounts
from qfsbackup.patience import NoAnswerError, in_time

log = logging.getLogger(__name__)

TABLE_TIMEOUT = 10.0  # seconds for the table of mounts, and for a mountpoint


@asynccontextmanager
async def mounted(
    root: Tree, mountpoint: Path, source: str, permissions: Permissions, sockets: Sockets
) -> AsyncIterator[trio.Event]:
    """Show `root` at `mountpoint`; the event is set when somebody unmounts it from outside.

    `source` is what /proc/mounts shows; `sockets` are those that the disks are read from. Leaving the context unmounts,
    lazily where a reader still holds a file open. Check the mountpoint first. Raises UserError where that fails.
    """
    unmounted = trio.Event()
    mountpoint = await in_time(mountpoint.resolve, TABLE_TIMEOUT)  # once mounted it would ask ourselves
    operations = Operations(root, permissions, sockets)
    async with _session(operations, mountpoint, source, permissions), trio.open_nursery() as nursery:
        nursery.start_soon(_serve, operations, unmounted)
        nursery.start_soon(_watch_mounts, mountpoint, unmounted)
        log.info("mounted %s at %s", source, mountpoint)
        try:
            yield unmounted
        finally:
            nursery.cancel_scope.cancel()
    log.info("unmounted %s", mountpoint)


async def _serve(operations: Operations, unmounted: trio.Event) -> None:
    await operations.serve()
    unmounted.set()


async def _watch_mounts(mountpoint: Path, unmounted: trio.Event) -> None:
    """Look for our mount whenever the table of mounts changes (proc(5): it then polls as POLLPRI).

    The kernel ends the session only when the last copy of the mount is gone, and every mount namespace that was made
    meanwhile (a container, `unshare -m`) holds one: without this the VM would keep our filters for as long as it lives.
    """
    ours = await _mounts_at(mountpoint)
    if not ours:  # mounted where this process cannot see it: the session's end is all there is to wait for
        return
    with MOUNTINFO.open() as table, select.epoll() as changes:
        changes.register(table, select.EPOLLPRI)
        while ours & await _mounts_at(None, instead=ours):
            await trio.lowlevel.wait_readable(changes.fileno())
            changes.poll(0)
    unmounted.set()


async def _mounts_at(mountpoint: Path | None, instead: Set[int] = frozenset()) -> Set[int]:
    """The ids of our mounts there, or anywhere; `instead` where the kernel does not tell: it holds a lock meanwhile."""
    try:
        found = await in_time(our_mounts, TABLE_TIMEOUT)
    except NoAnswerError:
        return instead
    return {mount.id for mount in found if mountpoint in (None, mount.mountpoint)}


@asynccontextmanager
async def _session(
    operations: Operations, mountpoint: Path, source: str, permissions: Permissions
) -> AsyncIterator[None]:
    """libfuse's session. Nobody may answer a request once it is closed: libfuse has freed it."""
    try:
        pyfuse3.init(operations, str(mountpoint), _mount_options(source, permissions))
    except RuntimeError as error:
        raise UserError(
            f"cannot mount at {mountpoint}: {error}",
            "Mounting takes root and the fuse kernel module; the line above this one has libfuse's reason.",
            EXIT_SYSTEM,
        ) from None
    ours: Set[int] = frozenset()
    try:
        ours = await _mounts_at(mountpoint)
        _check_table()
        yield
    finally:
        with trio.CancelScope(shield=True):
            still = await _mounts_at(None, instead=ours)
        # libfuse complains where somebody else has unmounted it already.
        pyfuse3.close(unmount=not ours or bool(ours & still))


def _check_table() -> None:
    if not _ops.is_extended():
        raise UserError(
            "this libfuse or pyfuse3 no longer calls fuse_session_new, so holes could not be shown or punched",
            "Use the versions that pyproject.toml names, and report this with the output of `pip list`.",
            EXIT_SYSTEM,
        )


def _mount_options(source: str, permissions: Permissions) -> set[str]:
    escaped = source.replace("\\", "\\\\").replace(",", "\\,")
    options = {"default_permissions", "subtype=qfsbackup", f"fsname={escaped}", "noatime", "nosuid", "nodev", "noexec"}
    if (permissions.uid, permissions.gid, permissions.mode) != (0, 0, None):
        options.add("allow_other")
    if permissions.read_only:
        options.add("ro")
    return options


def check_mountpoint(mountpoint: Path) -> None:
    """Raises UserError unless `mountpoint` is a folder on which nothing of ours is mounted already.

    A dead mount of ours is taken away: whoever mounts every night must not need a person after a crash.
    """
    try:
        detach_dead(mountpoint)
        mode = mountpoint.stat().st_mode
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise UserError(
                f"a dead mount covers {mountpoint}", f"Take it away first: umount -l {mountpoint}"
            ) from None
        raise UserError(
            f"cannot use the mountpoint {mountpoint}: {error.strerror}", f"Make the folder first: mkdir -p {mountpoint}"
        ) from None
    if not stat.S_ISDIR(mode):
        raise UserError(f"the mountpoint {mountpoint} is not a folder", "Name an empty folder.")
    if (mountpoint / ".qfsbackup").exists() and os.path.ismount(mountpoint):
        raise _taken(mountpoint)


def _taken(mountpoint: Path) -> UserError:
    try:
        mount = find_mount(mountpoint)
        return held_by(mount.status()["pid"], mount.source)
    except OSError:
        return UserError(f"{mountpoint} already shows a snapshot", f"Unmount it first: qfsbackup umount {mountpoint}")
