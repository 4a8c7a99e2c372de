# SPDX-License-Identifier: LGPL-2.1-or-later
"""A freeze by agents that are silent, late, or talk garbage."""

from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio
import trio.testing

from qfsbackup.errors import UserError
from qfsbackup.options import Freeze as Mode
from qfsbackup.vm import agent as agent_module
from qfsbackup.vm import freeze as freeze_module
from qfsbackup.vm.agents.agent_socket import AgentSocket
from qfsbackup.vm.freeze import Freeze, Frozen, StillFrozenError, frozen
from tests.vm.fake_agent import Guest, fake_agent, silent


def asked(mode: Mode, path: Path | None, note: Path | None = None) -> AbstractAsyncContextManager[Frozen]:
    """A freeze by the agent behind this socket."""
    return frozen(Freeze(mode, AgentSocket(path) if path else None, note), running=True)


async def test_a_silent_agent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """The socket of an agent that is not there accepts connections and says nothing."""
    autojump_clock.autojump_threshold = 0.05  # seconds of silence on the real sockets
    async with fake_agent(tmp_path / "agent", silent) as path:
        async with asked("auto", path) as state:
            assert not state.frozen
        assert "did not answer" in caplog.text
        with pytest.raises(UserError, match="did not answer"):
            async with asked("require", path):
                pytest.fail("was not refused")


@pytest.mark.parametrize(("mode", "path"), [("auto", None), ("off", Path("/nonexistent"))])
async def test_no_agent_is_asked(mode: Mode, path: Path | None, caplog: pytest.LogCaptureFixture) -> None:
    async with asked(mode, path) as state:
        assert not state.frozen
    assert caplog.records == []


@pytest.mark.parametrize("path", [None, Path("/nonexistent/agent")])
async def test_a_required_freeze_needs_an_agent(path: Path | None) -> None:
    with pytest.raises(UserError) as caught:
        async with asked("require", path):
            pytest.fail("was not refused")
    assert "agent=" in caught.value.hint


async def test_an_agent_that_talks_garbage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def garbage(_command: str, _arguments: dict[str, object]) -> bytes:
        return b"\x00garbage\xff\xffgarbage\n" * 100

    async with (
        fake_agent(tmp_path / "agent", garbage) as path,
        asked("auto", path) as state,
    ):
        assert not state.frozen
    assert "not JSON" in caplog.text


async def test_what_the_agent_owes_to_an_earlier_client_is_skipped(tmp_path: Path) -> None:
    guest = Guest()
    guest.debts = b'{"return": "frozen"}\n\xff{"return": 17}\n{"return": "frozen"}\n'
    async with fake_agent(tmp_path / "agent", guest.answer) as path:
        async with asked("require", path) as state:
            assert state.frozen
        assert state.held
    assert guest.state == "thawed"


async def test_a_guest_that_thaws_by_itself_was_not_held(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Windows does so after 10 seconds."""
    guest = Guest()
    async with fake_agent(tmp_path / "agent", guest.answer) as path:
        async with asked("auto", path) as state:
            guest.state = "thawed"
        assert not state.held
        assert "thawed by itself" in caplog.text
        with pytest.raises(UserError, match="thawed by itself"):
            async with asked("require", path):
                guest.state = "thawed"


async def test_a_lost_answer_to_freeze_is_followed_by_a_thaw(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    autojump_clock.autojump_threshold = 0.05  # seconds of silence on the real sockets
    guest = Guest()
    guest.lose = {"guest-fsfreeze-freeze"}
    async with (
        fake_agent(tmp_path / "agent", guest.answer) as path,
        asked("auto", path) as state,
    ):
        assert not state.frozen
        assert guest.state == "thawed"
    assert "did not answer within 6 s" in caplog.text


async def test_the_thaw_does_not_wait_for_an_agent_that_owes_an_answer(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    autojump_clock.autojump_threshold = 0.05  # seconds of silence on the real sockets
    guest, times = Guest(), dict[str, float]()

    async def answer(command: str, arguments: dict[str, object]) -> bytes:
        times.setdefault(command, trio.current_time())
        if command == "guest-fsfreeze-freeze":
            guest.lose, guest.lose_count = {command, "guest-sync-delimited"}, 3
        return await guest.answer(command, arguments)

    async with fake_agent(tmp_path / "agent", answer) as path, asked("auto", path):
        assert guest.state == "thawed"
    assert times["guest-fsfreeze-thaw"] - times["guest-fsfreeze-freeze"] < 7


async def test_thawing_is_tried_again_until_it_works(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    autojump_clock.autojump_threshold = 0.05  # seconds of silence on the real sockets
    guest = Guest()
    async with (
        fake_agent(tmp_path / "agent", guest.answer) as path,
        asked("auto", path),
    ):
        guest.lose = {"guest-fsfreeze-thaw", "guest-fsfreeze-status", "guest-sync-delimited"}
        guest.lose_count = 4
    assert guest.state == "thawed"
    assert "trying again" in caplog.text


async def test_a_cancelled_block_is_thawed(tmp_path: Path) -> None:
    guest = Guest()
    async with fake_agent(tmp_path / "agent", guest.answer) as path:
        with trio.CancelScope() as scope:
            async with asked("auto", path):
                scope.cancel()
                await trio.lowlevel.checkpoint()
        assert guest.state == "thawed"


async def test_an_agent_that_never_thaws_does_not_block_us(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    autojump_clock.autojump_threshold = 0.05  # seconds of silence on the real sockets
    guest = Guest()
    async with fake_agent(tmp_path / "agent", guest.answer) as path:
        guest.lose, guest.lose_count = {"guest-fsfreeze-thaw"}, 1000
        start = trio.current_time()
        with pytest.raises(StillFrozenError, match="may still be frozen"):
            async with asked("auto", path, tmp_path / "note"):
                pass
        assert trio.current_time() - start < freeze_module.THAW_TIMEOUT + agent_module.ANSWER_TIMEOUT
    assert (tmp_path / "note").read_text() == str(path)
