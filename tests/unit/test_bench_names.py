"""Tests are named as llama-bench names them, and lists of counts are read as llama-bench reads them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnext.bench.names import Scenario, parse_counts, parse_name, scenarios
from qnext.errors import UsageError

COUNTS = st.integers(1, 2**31 - 1)
SCENARIOS = st.one_of(
    st.builds(Scenario, COUNTS, st.just(0), st.integers(0, 2**31 - 1)),
    st.builds(Scenario, st.just(0), COUNTS, st.integers(0, 2**31 - 1)),
)


@pytest.mark.parametrize(
    ("scenario", "name"),
    [
        (Scenario(512, 0), "pp512"),
        (Scenario(0, 128), "tg128"),
        (Scenario(512, 0, 4096), "pp512 @ d4096"),
        (Scenario(0, 128, 16384), "tg128 @ d16384"),
    ],
)
def test_a_test_bears_the_name_llama_bench_prints(scenario: Scenario, name: str) -> None:
    assert scenario.name == name


@given(SCENARIOS)
def test_a_name_leads_back_to_its_test(scenario: Scenario) -> None:
    assert parse_name(scenario.name) == scenario


def test_case_and_blanks_in_a_name_do_not_matter() -> None:
    assert parse_name(" TG128@d4096 ") == Scenario(0, 128, 4096)


@pytest.mark.parametrize(
    "text",
    ["", "pp", "pp0", "512", "pp-1", "tg128 d4096", "pp512+tg128", "pp512 @ 4096", "pp٣", "tg9999999999"],
)
def test_what_is_no_name_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_name(text)
    assert "tg128" in error.value.hint


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("512", (512,)),
        ("512,1024", (512, 1024)),
        (" 0 , 4096 ", (0, 4096)),
        ("1-3", (1, 2, 3)),
        ("0-4096+2048", (0, 2048, 4096)),
        ("512-4096*2", (512, 1024, 2048, 4096)),
        ("8,512,8", (8, 512)),
    ],
)
def test_lists_and_ranges_are_read_as_llama_bench_reads_them(text: str, counts: tuple[int, ...]) -> None:
    assert parse_counts(text, "-p") == counts


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "512,",
        "5l2",
        "-1",
        "1.5",
        "9-3",
        "0-9*2",
        "1-9*1",
        "1-9+0",
        "0-2147483647",
        "2147483648",
        "1e3",
    ],
)
def test_what_is_no_list_is_a_usage_error_that_names_the_option(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_counts(text, "-d")
    assert error.value.message.startswith("-d ") and "-d 512,1024" in error.value.hint


def test_a_grid_goes_by_depth_so_that_a_filled_context_is_used_again() -> None:
    names = [scenario.name for scenario in scenarios((512, 1024), (128,), (0, 4096))]
    assert names == ["pp512", "pp1024", "tg128", "pp512 @ d4096", "pp1024 @ d4096", "tg128 @ d4096"]


def test_a_count_of_zero_leaves_its_test_out() -> None:
    assert [scenario.name for scenario in scenarios((0,), (128,))] == ["tg128"]
    with pytest.raises(UsageError):
        scenarios((0,), (0,))


@given(st.lists(st.integers(0, 5)), st.lists(st.integers(0, 5)), st.lists(st.integers(0, 3), min_size=1))
def test_no_test_of_a_grid_runs_twice_and_each_times_some_tokens(
    prompts: list[int], generates: list[int], depths: list[int]
) -> None:
    if not any(prompts + generates):
        return
    grid = scenarios(prompts, generates, depths)
    assert len(set(grid)) == len(grid)
    assert all(scenario.tokens > 0 for scenario in grid)
