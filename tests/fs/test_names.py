# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disk names come from elsewhere: whatever they hold, the file name is one harmless path component."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qfsbackup.backup.names import LONGEST, file_name

nasty = st.one_of(
    st.text(), st.sampled_from(["", ".", "..", "/", "../../etc/passwd", "a\nb", "\0", "\ud800", "x" * 5000])
)


@given(name=nasty)
def test_a_file_name_is_printable_ascii_of_bounded_length_without_slash_or_leading_dot(name: str) -> None:
    result = file_name(name)
    assert 0 < len(result) <= LONGEST
    assert result.isascii()
    assert result.isprintable()
    assert "/" not in result
    assert not result.startswith(".")


@given(first=nasty, second=nasty)
def test_different_disks_have_different_file_names(first: str, second: str) -> None:
    assert (file_name(first) == file_name(second)) == (first == second)


def test_usual_names_stay_as_they_are() -> None:
    for name in ("vda", "drive-scsi0", "virtio0", "my_disk.1", "disk:0"):
        assert file_name(name) == name
