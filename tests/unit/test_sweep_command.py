"""What the command line of a sweep means, and what it refuses."""

from __future__ import annotations

import pytest

from qnext.cli.bench_sweep import _grid, _pinned, parse_budget
from qnext.cli.flags import PlanFlags
from qnext.errors import UsageError
from qnext.pipeline.sweep_values import Grid


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("10m", (600.0, None)),
        ("90s", (90.0, None)),
        ("1.5h", (5400.0, None)),
        ("45", (45.0, None)),
        ("2 min", (120.0, None)),
        ("30 cells", (None, 30)),
        ("1 cell", (None, 1)),
    ],
)
def test_a_budget_is_a_time_or_a_number_of_cells(text: str, meant: tuple[float | None, int | None]) -> None:
    assert parse_budget(text) == meant


@pytest.mark.parametrize("text", ["", "0", "0 cells", "ten", "-5m", "5 m m", "10 loads"])
def test_anything_else_is_no_budget(text: str) -> None:
    with pytest.raises(UsageError, match="not a budget"):
        parse_budget(text)


def test_lists_become_levels_and_a_single_value_is_the_plans_too() -> None:
    grid = _grid({"ubatch": "512, 1024", "threads": "6", "kv_type_k": "f16,q8_0", "batch": None})
    assert grid == Grid(ubatch=(512, 1024), threads=(6,), kv_type_k=("f16", "q8_0"))
    assert grid.closed and not Grid(threads=(6,)).closed
    flags = _pinned(PlanFlags(), grid)
    assert (flags.threads, flags.ubatch, flags.cache_type_k) == (6, None, None)
    assert _pinned(PlanFlags(), _grid({"cpu_experts": "4"})).n_cpu_moe == 4


@pytest.mark.parametrize(
    ("knob", "text", "words"),
    [
        ("ubatch", "512,,1024", "'' is not a value of -ub"),
        ("threads", "0", "'0' is not a value of -t"),
        ("kv_type_k", "f16,q9", "'q9' is not a value of -ctk"),
        ("repack", "sideways", "not a value of --repack"),
    ],
)
def test_a_level_that_is_none_is_named(knob: str, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        _grid({knob: text})
