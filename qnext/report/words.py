"""How figures and names are written for people: speeds, ranges, times, tests."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from qnext.plan.values import SpeedRange, Workload

MEMORY_PARTS = (
    ("weights", "weights_bytes"),
    ("KV cache", "kv_bytes"),
    ("recurrent", "recurrent_bytes"),
    ("compute", "compute_bytes"),
    ("other", "other_bytes"),
    ("total", "total_bytes"),
)
"""What memory goes to: the word shown and the field of `DeviceMemory`, in the order shown."""


def speed(tps: float | None) -> str:
    """`31.2 t/s`, with as many digits as are worth reading; `–` for None."""
    if tps is None:
        return "–"
    return f"{digits(tps)} t/s"


def digits(value: float) -> str:
    """Three significant digits or all before the point, never an exponent."""
    for limit, places in ((0.995, 3), (9.995, 2), (99.95, 1)):
        if value < limit:
            return f"{value:.{places}f}"
    return f"{value:,.0f}"


def forecast(tps: SpeedRange | None) -> str:
    """`28.4 t/s (19.9–38.3)`; `no forecast` for None."""
    if tps is None:
        return "no forecast"
    return f"{digits(tps.mid)} t/s ({digits(tps.low)}–{digits(tps.high)})"


def workload_words(workload: Workload) -> str:
    """`a prompt of 1,024 and an answer of 512 tokens after 4,096`."""
    after = f" after {workload.depth:,}" if workload.depth else ""
    return f"a prompt of {workload.prompt:,} and an answer of {workload.generate:,} tokens{after}"


def plural(count: int, noun: str) -> str:
    """`1 layer`, `3 layers`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def chance(share: float) -> str:
    """`96%`; never more than `over 99%`, which a few measurements cannot tell."""
    return "over 99%" if share > 0.99 else f"{share:.0%}"


def interval(low: float, high: float, confidence: float, pairs: int) -> str:
    """`94% interval -13.0% to -1.2%, 5 pairs`, of ratios; one pair has none: `a single pair, -3.0%`."""
    if pairs == 1:
        return f"a single pair, {low - 1:+.1%}"
    return f"{confidence:.0%} interval {low - 1:+.1%} to {high - 1:+.1%}, {plural(pairs, 'pair')}"


def local_time(utc: str) -> str:
    """`2026-11-21 02:38` on this machine's clock, from a record's ISO 8601 time."""
    return datetime.fromisoformat(utc).astimezone().strftime("%Y-%m-%d %H:%M")


def scenario_words(prompt: int, generate: int, depth: int) -> str:
    """What a test is, in words: `prefill 512`, `decode 128 at 4,096`, `prefill 512 + decode 128`."""
    parts = [f"{word} {count:,}" for word, count in (("prefill", prompt), ("decode", generate)) if count]
    return " + ".join(parts) + (f" at {depth:,}" if depth else "")


def shell_lines(words: Sequence[str], width: int) -> list[str]:
    """A command broken between its words into lines that a shell takes as one when pasted.

    `words` are quoted already; each line but the last ends in a backslash, the first alone is not indented.
    A flag stays with the value after it.
    """
    groups: list[str] = []
    for word in words:
        if groups and not word.startswith("-") and groups[-1].startswith("-") and " " not in groups[-1]:
            groups[-1] += f" {word}"
        else:
            groups.append(word)
    lines: list[str] = []
    for group in groups:
        if lines and len(lines[-1]) + len(group) + 3 <= width:
            lines[-1] += f" {group}"
        else:
            lines.append(f"  {group}" if lines else group)
    return [line + " \\" for line in lines[:-1]] + lines[-1:]
