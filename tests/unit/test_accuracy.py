"""How far off forecasts were."""

from __future__ import annotations

import pytest

from qnext.bench.accuracy import accuracy
from qnext.plan.values import SpeedRange


def test_errors_are_shares_of_what_was_measured() -> None:
    found = accuracy(
        [(SpeedRange(8, 10, 12), 10.0), (SpeedRange(8, 10, 12), 5.0), (SpeedRange(9, 11, 13), 10)]
    )
    assert found is not None and found.tests == 3
    assert found.median_error == pytest.approx(0.1) and found.worst_error == pytest.approx(1.0)
    assert found.inside == pytest.approx(2 / 3) and found.bias == pytest.approx(1.1)


def test_without_forecasts_there_is_nothing_to_tell() -> None:
    assert accuracy([]) is None
