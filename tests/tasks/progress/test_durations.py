"""Lengths of time, as they are printed."""

import pytest

from tasks.progress.durations import duration


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0 s"),
        (40.4, "40 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (12 * 60, "12 min"),
        (59.6 * 60, "1h00m"),
        (3900, "1h05m"),
        (47.5 * 3600, "47h30m"),
        (48 * 3600 - 1, "2d00h"),
        (76 * 3600, "3d04h"),
        (71.9 * 3600, "3d00h"),
    ],
)
def test_times_have_two_digits_or_three_and_their_unit(seconds, text):
    assert duration(seconds) == text
