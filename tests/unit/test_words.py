"""Figures, commands and tables as people read them."""

from __future__ import annotations

import subprocess
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from qnext.plan.values import DeviceMemory, SpeedRange
from qnext.report.record_view import memory_comparison, speed_table
from qnext.report.words import (
    chance,
    digits,
    forecast,
    interval,
    local_time,
    plural,
    scenario_words,
    shell_lines,
    speed,
)
from qnext.store.record import TestResult
from qnext.units import GIB


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0412, "0.041"),
        (0.9951, "1.00"),
        (9.994, "9.99"),
        (9.996, "10.0"),
        (31.24, "31.2"),
        (99.96, "100"),
        (1234.5, "1,234"),
    ],
)
def test_digits_are_those_worth_reading(value: float, text: str) -> None:
    assert digits(value) == text


def test_unknown_speeds_are_said_to_be_unknown() -> None:
    assert speed(None) == "–"
    assert forecast(None) == "no forecast"
    assert forecast(SpeedRange(19.9, 28.4, 38.3)) == "28.4 t/s (19.9–38.3)"


def test_counts_and_tests_in_words() -> None:
    assert plural(1, "layer") == "1 layer"
    assert plural(1200, "token") == "1,200 tokens"
    assert scenario_words(512, 0, 0) == "prefill 512"
    assert scenario_words(0, 128, 4096) == "decode 128 at 4,096"
    assert scenario_words(512, 128, 0) == "prefill 512 + decode 128"


def test_times_are_shown_on_this_machines_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert local_time("2026-11-21T20:38:17+00:00") == "2026-11-22 05:38"
    finally:
        monkeypatch.undo()
        time.tzset()


_WORD = st.text("abcXYZ019./=-", min_size=1, max_size=30)


@given(st.lists(_WORD, min_size=1, max_size=20), st.integers(20, 120))
def test_a_broken_command_keeps_its_words(words: list[str], width: int) -> None:
    lines = shell_lines(words, width)
    assert " ".join(line.removesuffix(" \\") for line in lines).split() == words
    assert all(line.endswith(" \\") for line in lines[:-1])
    assert not lines[-1].endswith("\\")


def test_a_broken_command_means_the_same_to_a_shell() -> None:
    words = ["echo", "-m", "/models/" + "x" * 70, "-ot", "exps=CPU", "-c", "4096", "--flag", "-t", "1"]
    script = "\n".join(shell_lines(words, 40))
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True, timeout=20)
    assert done.stdout.split() == words[1:]


def _draw(table: object, width: int) -> list[str]:
    console = Console(file=StringIO(), width=width)
    console.print(table)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_memory_of_three_devices_stays_in_80_columns_without_wrapping() -> None:
    devices = [DeviceMemory(name, "gpu", None, *[9 * GIB] * 5) for name in ("CPU", "CUDA0", "CUDA1")]
    lines = _draw(memory_comparison(devices, devices), 80)
    assert len(lines) == 2 + 6
    assert lines[-1].count("45.00 GiB") == 6


def test_a_device_that_was_not_allocated_shows_a_dash() -> None:
    device = DeviceMemory("CPU", "host", None, 1, 2, 3, 4)
    assert _draw(memory_comparison([device], []), 80)[-1].split() == ["total", "10", "B", "–"]


def test_tests_stay_in_80_columns_without_wrapping() -> None:
    fast = SpeedRange(3584.0, 6516.0, 10426.0)
    test = TestResult("pp16384 @ d65536", 16384, 0, 65536, (1, 2), 6516.0, 3584.0, 10426.0, fast, None)
    assert len(_draw(speed_table([test]), 80)) == 2


@pytest.mark.parametrize(
    ("share", "text"), [(0.957, "96%"), (0.99, "99%"), (0.996, "over 99%"), (1.0, "over 99%")]
)
def test_a_chance_is_never_told_as_certain(share: float, text: str) -> None:
    assert chance(share) == text


def test_one_pair_has_no_interval() -> None:
    assert interval(0.87, 0.988, 0.94, 5) == "94% interval -13.0% to -1.2%, 5 pairs"
    assert interval(0.97, 0.97, 0.0, 1) == "a single pair, -3.0%"
