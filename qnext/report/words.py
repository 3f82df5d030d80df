"""How figures are written for people: speeds, ranges, shares."""

from __future__ import annotations

from qnext.plan.values import SpeedRange


def speed(tps: float | None) -> str:
    """`31.2 t/s`, with as many digits as are worth reading; `–` for None."""
    if tps is None:
        return "–"
    return f"{digits(tps)} t/s"


def digits(value: float) -> str:
    """Three significant digits, never an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def forecast(tps: SpeedRange | None) -> str:
    """`28.4 t/s (19.9–38.3)`; `no forecast` for None."""
    if tps is None:
        return "no forecast"
    return f"{digits(tps.mid)} t/s ({digits(tps.low)}–{digits(tps.high)})"


def plural(count: int, noun: str) -> str:
    """`1 layer`, `3 layers`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
