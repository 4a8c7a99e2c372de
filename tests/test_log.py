# SPDX-License-Identifier: LGPL-2.1-or-later
"""No name can end a line of the log, or tell a terminal what to do."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qfsbackup.errors import UserError
from qfsbackup.log import Formatter, JournalFormatter, printable, say

HOSTILE = "\x1b]0;title\x07\n<0>forged\r\u2028\x85\udcff\u202eend"


@given(st.text(st.characters()))
def test_what_is_printed_is_printable_and_what_was_so_stays(text: str) -> None:
    assert printable(text).isprintable()
    assert printable("".join(filter(str.isprintable, text))) == "".join(filter(str.isprintable, text))


def record(message: str, error: BaseException | None = None) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord("qfsbackup", logging.WARNING, "file.py", 1, "a disk %s", (message,), info)


@pytest.mark.parametrize("formatter", [Formatter(), JournalFormatter()])
def test_a_message_is_one_line(formatter: logging.Formatter) -> None:
    line = formatter.format(record(HOSTILE))
    assert line.isprintable()
    assert r"a disk \x1b]0;title\x07\n<0>forged\r" in line


def test_a_traceback_keeps_its_lines() -> None:
    lines = JournalFormatter().format(record("name", ExceptionGroup("a group", [ValueError(HOSTILE)]))).split("\n")
    assert lines[0] == "<4>a disk name"
    assert len(lines) > 3
    assert all(line.startswith("<4>") and line.isprintable() for line in lines)


def test_an_error_is_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    say(UserError(f"no disk {HOSTILE}", f"Its disks are: {HOSTILE}."))
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 2
    assert said.replace("\n", "").isprintable()
