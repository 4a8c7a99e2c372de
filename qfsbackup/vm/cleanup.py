# SPDX-License-Identifier: LGPL-2.1-or-later
"""Undo what a dead mount left in a VM, by looking into the VM itself: everything of ours begins with `qfsbackup-`.

Safe to repeat, and where there is nothing. What is not ours is not touched: the guest is let run on and thawed, and the
NBD server stopped, only where our marks show that we were at work.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from qfsbackup.at_work import held_by
from qfsbackup.errors import UserError
from qfsbackup.vm.agent import AgentError, GuestAgent
from qfsbackup.vm.fleecing import empty_fdsets, remove_fdsets
from qfsbackup.vm.fleecing_folder import answers, files_of
from qfsbackup.vm.freeze import thaw_leftover
from qfsbackup.vm.left import left
from qfsbackup.vm.look.graph import look_at_graph
from qfsbackup.vm.monitor import Monitor
from qfsbackup.vm.node import remove_node
from qfsbackup.vm.ours import ACCESS, FLEECING, FROZEN, LOW_WATER, NEW, OWNER, PREFIX
from qfsbackup.vm.owner import Owner, living_owner, remove_line
from qfsbackup.vm.recipes import RECIPES
from qfsbackup.vm.server import stop_server

log = logging.getLogger(__name__)


async def undo_leftovers(qmp: Monitor, agent: GuestAgent | None = None) -> list[str]:
    """Undo a dead mount's leftovers; returns what was undone. `agent` is the guest's, if it is known.

    Raises UserError where the mount is alive or something cannot be undone, QmpError where QEMU cannot be asked.
    """
    ours = await refuse_living(qmp)
    done = await _free_guest(qmp, ours, agent) if ours else []
    if any(name.startswith(FLEECING) for name in ours) and not await answers(files_of(qmp.peer_pid)):
        raise UserError(
            "the fleecing files' file system does not answer, and QEMU would hang with it",
            "Once it answers, try again: the guest goes on meanwhile.",
        )
    await remove_fdsets(qmp)
    if not ours:
        await remove_line(qmp)
        await empty_fdsets(qmp)
        return []
    await stop_server(qmp)
    await _remove_nodes(qmp, ours)
    await remove_line(qmp)
    stays = [line for line in await left(qmp) if NEW not in line]
    if stays:
        raise UserError(
            f"what a snapshot left cannot be removed from the VM: {', '.join(stays)}",
            "Something else in QEMU uses them (a job, or a snapshot taken meanwhile?): end that, then try again.",
        )
    await empty_fdsets(qmp)
    return [*done, f"removed {', '.join(ours)}"]


async def refuse_living(qmp: Monitor) -> list[str]:
    """What is ours in QEMU. Raises UserError where it is a living mount's."""
    ours = await _ours(qmp)
    owner = await living_owner(qmp, ours)
    if owner is not None:
        raise held_by(owner.pid, "this VM") if owner.here else _elsewhere(owner)
    return ours


def _elsewhere(owner: Owner) -> UserError:
    if not owner.pid:
        return UserError("another qfsbackup is about to take a snapshot of this VM", "Wait for its end.")
    return UserError(
        f"a qfsbackup in another PID namespace has a snapshot of this VM, and lives, as process {owner.pid} there",
        "Unmount it there (in its container, or on the host), or end that process: its supervisor then cleans up.",
    )


async def _ours(qmp: Monitor) -> list[str]:
    """But for the marks of bitmaps: what becomes of these is for the state store to say (see leftovers).

    Names alone: to tell more of a fleecing file QEMU asks its file system, and would hang with that.
    """
    names = (await look_at_graph(qmp)).children
    return sorted(name for name in names if name.startswith(PREFIX) and not name.startswith(NEW))


async def _free_guest(qmp: Monitor, ours: Sequence[str], agent: GuestAgent | None) -> list[str]:
    """Let a guest that we stopped run on, then thaw it: a stopped guest's agent cannot answer."""
    done = [line for recipe in RECIPES.values() for line in await recipe.free_guest(qmp, ours)]
    if FROZEN in ours:
        done += await _thaw(qmp, agent)
    return done


async def _thaw(qmp: Monitor, agent: GuestAgent | None) -> list[str]:
    """The mark stays where the agent does not answer: so it is tried again."""
    if agent is None:
        log.warning("the guest's file systems may be frozen: name its agent, or have it run guest-fsfreeze-thaw")
        thawed = False
    else:
        try:
            thawed = await thaw_leftover(agent)
        except AgentError as error:
            log.warning("cannot tell whether the guest's file systems are frozen: %s", error)
            return []
    await remove_node(qmp, FROZEN)
    return ["thawed the guest's file systems"] if thawed else []


async def _remove_nodes(qmp: Monitor, ours: Sequence[str]) -> None:
    """What stands on others goes first; the owner's mark goes last, so that an interrupted clean-up can be repeated."""
    await _remove(qmp, ours, ACCESS)
    for recipe in RECIPES.values():
        await recipe.take_down(qmp, ours)
    for prefix in (FLEECING, LOW_WATER, OWNER):
        await _remove(qmp, ours, prefix)


async def _remove(qmp: Monitor, ours: Sequence[str], prefix: str) -> None:
    for name in ours:
        if name.startswith(prefix):
            await remove_node(qmp, name)
