# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every GuestAgent promises (vm/agent.py), with a real guest behind it. A new one is a line in AGENTS."""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import trio

from qfsbackup.vm.agent import ANSWER_TIMEOUT, Agent, AgentError, GuestAgent
from qfsbackup.vm.agents.agent_socket import AgentSocket
from qfsbackup.vm.agents.domain_agent import DomainAgent
from tests.harness.disk import Disk
from tests.harness.libvirt import libvirt
from tests.harness.qemu import available, selected
from tests.harness.shell import Shell
from tests.harness.vm import running_vm


@dataclass(frozen=True)
class Bed:
    """A booted guest, its agent, how to see the guest and how to hurt its QEMU."""

    agent: GuestAgent
    shell: Shell
    send: Callable[[signal.Signals], None]


@asynccontextmanager
async def by_socket(folder: Path) -> AsyncIterator[Bed]:
    """A unix socket of QEMU's."""
    disks = [Disk("vda", folder / "vda.raw")]
    async with running_vm(selected()[-1], folder, disks, guest=True, agent=True) as vm:
        assert vm.agent is not None
        yield Bed(AgentSocket(vm.agent), vm.shell, vm.process.send)


@asynccontextmanager
async def by_libvirt(folder: Path) -> AsyncIterator[Bed]:
    """A domain's."""
    disks = [Disk("vda", folder / "vda.raw")]
    async with libvirt(folder) as host, host.domain(available()[0], folder, disks, guest=True) as domain:
        yield Bed(DomainAgent(host.uri, domain.name), domain.shell, partial(os.kill, domain.pid))


AGENTS: dict[str, Callable[[Path], AbstractAsyncContextManager[Bed]]] = {"socket": by_socket, "libvirt": by_libvirt}


@pytest.mark.parametrize("kind", AGENTS)
async def test_a_guest_s_agent(kind: str, tmp_path: Path) -> None:
    """All in one, for a guest takes seconds to boot."""
    async with AGENTS[kind](tmp_path) as bed:
        await bed.shell.run("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt")
        await answers_and_refuses(bed)
        await is_silent_while_qemu_hangs_and_in_step_after_it(bed)
        await thaws_unheard(bed)


async def answers_and_refuses(bed: Bed) -> None:
    """Each command its own answer, also after an error; what is sent unheard is carried out."""
    async with bed.agent.open() as agent:
        assert await agent.call("guest-fsfreeze-status") == "thawed"
        assert agent.in_step
        with pytest.raises(AgentError, match="no-such"):
            await agent.call("guest-no-such-command")
        assert agent.in_step
        assert await agent.call("guest-fsfreeze-freeze") == 1
        await agent.send_unheard("guest-fsfreeze-thaw")
        assert not agent.in_step
        assert await agent.call("guest-fsfreeze-status") == "thawed"


async def is_silent_while_qemu_hangs_and_in_step_after_it(bed: Bed) -> None:
    """No call takes longer than it may, and an answer that comes too late is nobody's."""
    async with bed.agent.open() as agent:
        await agent.call("guest-fsfreeze-status")
        bed.send(signal.SIGSTOP)
        with trio.fail_after(2), pytest.raises(AgentError):
            await agent.call("guest-fsfreeze-thaw", timeout=0.5)
        assert not agent.in_step
        with trio.fail_after(ANSWER_TIMEOUT + 2), pytest.raises(AgentError):
            await agent.call("guest-fsfreeze-status")
        bed.send(signal.SIGCONT)
        with trio.fail_after(20):
            assert await status(agent) == "thawed"
        assert agent.in_step


async def thaws_unheard(bed: Bed) -> None:
    """Found by its name, and with nobody waiting for an answer."""
    async with bed.agent.open() as agent:
        assert await agent.call("guest-fsfreeze-freeze") == 1
    await trio.to_thread.run_sync(bed.agent.thaw_unheard)
    async with bed.agent.open() as agent:
        with trio.fail_after(10):
            while await status(agent) != "thawed":
                pass


async def status(agent: Agent) -> str:
    """Ask until there is an answer."""
    while True:
        with suppress(AgentError):
            return str(await agent.call("guest-fsfreeze-status"))


LIGHT = """
import sys
import qfsbackup.cli.mount, qfsbackup.mount.rescue
from qfsbackup.sources import find
for text in ("/nonexistent/web1.qmp", "nbd://nonexistent/disk"):
    source = find(text)
    source.is_there()
    source.thaw_unheard("/nonexistent/agent")
print(*{"trio", "nbd", "qemu", "pyfuse3", "asyncio"}.intersection(sys.modules))
"""


def test_the_supervisor_thaws_without_anything_heavy() -> None:
    """It stays for as long as the mount does, and has to act when there is no memory left."""
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
