# SPDX-License-Identifier: LGPL-2.1-or-later
"""When the fleecing files will be full."""

from hypothesis import given
from hypothesis import strategies as st

from qfsbackup.mount.watch import TREND, Trend


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 30), st.integers(1, 300))
def test_steady_growth_has_that_rate(start: int, rate: int, seconds: int) -> None:
    trend = Trend()
    for second in range(seconds + 1):
        trend.add(float(second), start + second * rate)
    assert trend.rate == rate


def test_what_was_longer_than_a_trend_ago_does_not_count() -> None:
    trend = Trend()
    trend.add(0.0, 0)
    trend.add(1.0, 1000)
    for second in range(int(TREND) + 1):
        trend.add(2.0 + second, 1000)
    assert trend.rate == 0


def test_files_that_shrink_are_never_full() -> None:
    trend = Trend()
    trend.add(0.0, 5)
    trend.add(1.0, 0)
    assert trend.rate == 0
