# SPDX-License-Identifier: LGPL-2.1-or-later
"""Joins the pillars: source -> snapshot -> disks -> tree -> mount, one ladder of contexts, undone in reverse.

What is made first is undone last, also when a later step fails or a signal comes in the middle: the mount goes before
the NBD connections, these before QEMU's nodes.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from qfsbackup import log as logs
from qfsbackup.contracts import Disk, Mounting, Source
from qfsbackup.errors import EXIT_INTERRUPTED, EXIT_SYSTEM, EXIT_UNRESTORED, UserError, only_error
from qfsbackup.fuse.mount import check_mountpoint, mounted
from qfsbackup.fuse.operations import Permissions
from qfsbackup.mount.chain import Chain, generations, open_chain
from qfsbackup.mount.checking import check, look_at_files
from qfsbackup.mount.defects import defects_raised
from qfsbackup.mount.notify import STOPPING, notify
from qfsbackup.mount.runtime import RUNTIME, runtime_folder
from qfsbackup.mount.signals import HANDED_ON, TELLING, acted_on
from qfsbackup.mount.stacks import all_stacks
from qfsbackup.mount.tree import make_tree, note
from qfsbackup.mount.watch import watch_fleecing
from qfsbackup.mount.watchdog import tell_the_watchdog
from qfsbackup.options import Options
from qfsbackup.patience import NoAnswerError, in_time
from qfsbackup.status import Status

log = logging.getLogger(__name__)

FOLDER_TIMEOUT = 20.0  # seconds

T = TypeVar("T")


def serve(source: Source, mountpoint: Path, options: Options, ready: Callable[[], None]) -> int:
    """Mount `source` at `mountpoint` and stay until it is unmounted or a signal asks to end.

    Returns the exit status: EXIT_SYSTEM where the snapshot broke meanwhile, EXIT_UNRESTORED where something of ours is
    left in QEMU, EXIT_INTERRUPTED after a SIGINT before it was ready. Calls `ready` once the tree can be read.
    Raises UserError; by then all is undone, unless its exit code is EXIT_UNRESTORED.
    """
    status = Status(
        facts={"source": source.name, "mountpoint": str(mountpoint), "pid": os.getpid(), "ppid": os.getppid()}
    )
    came: list[signal.Signals | str] = []  # what ended it, and "ready"

    def now_ready() -> None:
        came.append("ready")
        ready()

    def ended_by(number: signal.Signals) -> None:
        if not came:
            logs.only_warnings()
        came.append(number)

    try:
        with logs.in_thread():
            trio.run(partial(_serve, source, mountpoint, options, status, now_ready, ended_by))
    except BaseExceptionGroup as group:
        error = only_error(group)
        if status.unrestored and isinstance(error, UserError):
            error.exit_code = EXIT_UNRESTORED
            error.hint = (
                f"Left in the VM: {status.unrestored}. Process {os.getppid()} takes it out as soon as it can;"
                f" or do it: qfsbackup cleanup {source.name}"
            )
        raise (error if isinstance(error, UserError) else group) from None
    if status.unrestored:
        return EXIT_UNRESTORED
    if came[:1] == [signal.SIGINT]:
        return EXIT_INTERRUPTED
    return EXIT_SYSTEM if status.health.broken else 0


async def _serve(
    source: Source,
    mountpoint: Path,
    options: Options,
    status: Status,
    ready: Callable[[], None],
    ended_by: Callable[[signal.Signals], None],
) -> None:
    _allow_descriptors()
    async with AsyncExitStack() as stack:
        ending = await stack.enter_async_context(_ended_by_signals(ended_by))
        await stack.enter_async_context(defects_raised())
        await _asked(f"the mountpoint {mountpoint}", partial(check_mountpoint, mountpoint))
        runtime = await _asked(str(RUNTIME), partial(stack.enter_context, runtime_folder(source.name)))
        chain = await _chain(options, stack)
        mounting = Mounting(
            options=options,
            runtime=runtime,
            status=status,
            checkpoint=chain.request if chain else None,
            generations=partial(generations, options.state),
        )
        snapshot = await stack.enter_async_context(source.snapshot(mounting))
        note(status, snapshot, options)
        disks = [await stack.enter_async_context(disk.open()) for disk in snapshot.disks]
        tree = await make_tree(snapshot, disks, chain, options, status)
        permissions = Permissions(options.uid, options.gid, options.mode, options.ro)
        await look_at_files(status)
        stack.push_async_callback(_last_look, status, disks)
        mount = mounted(tree, mountpoint, source.name, permissions, mounting.sockets)
        unmounted = await stack.enter_async_context(mount)
        ending.end = unmounted.set
        stack.callback(notify, STOPPING)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch_fleecing, status, disks)
            nursery.start_soon(tell_the_watchdog)
            ready()
            await unmounted.wait()
            nursery.cancel_scope.cancel()


def _allow_descriptors() -> None:
    """As many as we may have: 1024, the usual soft limit, is for programs that use select(2)."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _asked(what: str, call: Callable[[], T]) -> T:
    """What `call` returns, which asks a file system that may hang. Raises UserError."""
    try:
        return await in_time(call, FOLDER_TIMEOUT)
    except NoAnswerError as error:
        raise UserError(f"{what}: {error}", "See whether its file system hangs, or who holds a lock there.") from None


async def _last_look(status: Status, disks: Sequence[Disk]) -> None:
    """Before the exit status is decided, however the mount ends."""
    with trio.CancelScope(shield=True):
        await check(status, disks)


async def _chain(options: Options, stack: AsyncExitStack) -> Chain | None:
    if options.target is None:
        return None
    in_image = options.bitmaps == "persistent"
    return await stack.enter_async_context(open_chain(options.target, options.state, options.chunk, in_image=in_image))


@dataclass(slots=True)
class _Ending:
    """What a signal that ends calls: once there is something to be looked at a last time, nothing may be cancelled."""

    end: Callable[[], None]


@asynccontextmanager
async def _ended_by_signals(ended_by: Callable[[signal.Signals], None]) -> AsyncIterator[_Ending]:
    """ENDING cancels what runs inside; its contexts then end in order. SIGUSR1 logs every task's stack."""
    numbers = acted_on()
    for number in numbers:
        signal.signal(number, lambda *_: None)  # one that comes while all ends already changes nothing
    with trio.open_signal_receiver(*numbers) as signals:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)  # the supervisor has held them back until now
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                async for number in signals:
                    if number == TELLING:
                        for line in all_stacks().splitlines():
                            log.warning("%s", line)
                        continue
                    ended_by(signal.Signals(number))
                    log.info("ending: %s", signal.Signals(number).name)
                    ending.end()

            ending = _Ending(nursery.cancel_scope.cancel)
            nursery.start_soon(wait)
            yield ending
            nursery.cancel_scope.cancel()
