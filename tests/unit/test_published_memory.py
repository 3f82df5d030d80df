"""Plans agree with logs of real GPUs that people published: cache, state and weights to the last digit."""

from __future__ import annotations

import csv

import pytest

from claims.published_memory import ROWS, Compared, compare_published


@pytest.fixture(scope="module")
def compared() -> list[Compared]:
    return compare_published()


def test_buffers_are_what_the_logs_print(compared: list[Compared]) -> None:
    exact = [one for one in compared if one.exact]
    assert {one.value for one in exact} >= {"gpu0_kv", "gpu1_kv", "gpu0_rs", "host_model", "host_output"}
    assert [one for one in exact if not one.holds] == []


def test_compute_buffers_are_near_what_the_logs_print(compared: list[Compared]) -> None:
    compute = [one for one in compared if not one.exact]
    assert len(compute) == 6
    assert [one for one in compute if not one.holds] == []


def test_a_row_left_out_says_why() -> None:
    with ROWS.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert all(row["source"] for row in rows)
    assert all(row["why_not"] for row in rows if row["used"] == "no" or row["not_compared"])
