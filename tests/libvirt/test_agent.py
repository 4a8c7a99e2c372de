# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest's file systems are frozen through libvirt, and thaw whatever becomes of it."""

import signal
from contextlib import suppress
from pathlib import Path

import trio

from qfsbackup.vm.agent import Agent, AgentError
from qfsbackup.vm.agents.domain_agent import DomainAgent
from tests.harness.libvirt import Domain
from tests.harness.mount import aside, mounted, qfsbackup


async def test_a_mount_freezes_through_libvirt(booted: Domain, tmp_path: Path) -> None:
    """All in one, for a guest takes seconds to boot."""
    await booted.shell.run("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt && echo before > /mnt/file")
    await a_mount_is_frozen_and_the_guest_is_not(booted, tmp_path)
    await a_freeze_of_others_is_theirs(booted, tmp_path)
    await the_guest_thaws_where_libvirtd_dies(booted)


async def a_mount_is_frozen_and_the_guest_is_not(booted: Domain, tmp_path: Path) -> None:
    """What was written before is there, though the guest did not sync."""
    async with mounted(booted.source, tmp_path / "mnt", "freeze=require") as mount:
        assert (await mount.json("vm.json"))["frozen"] is True
        await booted.shell.run("echo after > /mnt/file; sync")
        content = await aside(mount.image("vda").read_bytes)
    assert b"before\n" in content
    assert b"after\n" not in content


async def a_freeze_of_others_is_theirs(booted: Domain, tmp_path: Path) -> None:
    await booted.virsh("domfsfreeze")
    refused = await qfsbackup("mount", booted.source, tmp_path / "mnt", "-o", "freeze=require")
    refused.refused(32, "frozen already, by somebody else")
    async with mounted(booted.source, tmp_path / "mnt") as mount:
        assert (await mount.json("vm.json"))["frozen"] is False
    assert "frozen" in await booted.virsh("qemu-agent-command", '{"execute": "guest-fsfreeze-status"}')
    await booted.virsh("domfsthaw")


async def the_guest_thaws_where_libvirtd_dies(booted: Domain) -> None:
    async with DomainAgent(booted.host.uri, booted.name).open() as agent:
        assert await agent.call("guest-fsfreeze-freeze") == 1
        await booted.host.stop(signal.SIGKILL)
        with trio.fail_after(5):
            assert await agent.call("guest-fsfreeze-thaw") == 1
        await booted.host.start()
        with trio.fail_after(20):
            assert await status(agent) == "thawed"


async def status(agent: Agent) -> str:
    """Ask until there is an answer: a new libvirtd connects to the agent a little later."""
    while True:
        with suppress(AgentError):
            return str(await agent.call("guest-fsfreeze-status"))
