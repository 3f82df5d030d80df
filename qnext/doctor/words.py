"""A price in one line, the same in the terminal, in JSON and in a bug report."""

from __future__ import annotations

from qnext.doctor.values import Change, Finding
from qnext.plan.values import SpeedRange

WORTH_SAYING = 0.015
"""Smaller changes of a speed are not told."""


def price_text(finding: Finding) -> str:
    """`decode −45 %, about 9 (4.5–18) instead of 16 (8–32) t/s for …`, or why there is no price."""
    if finding.price is None:
        return f"no price: {finding.unpriced}"
    price = finding.price
    told = [
        text
        for name, change in (("decode", price.decode), ("prefill", price.prefill))
        if (text := _change(name, change))
    ]
    if not told:
        return f"costs {price.model} nothing worth telling"
    text = f"{'; '.join(told)} for {price.model}"
    return f"{text}, if {price.supposing}" if price.supposing else text


def _change(name: str, change: Change) -> str:
    if change.now is None:
        return f"{name} about {_range(change.mended)} t/s once it fits" if change.mended else ""
    if change.share is None or change.mended is None or abs(change.share) < WORTH_SAYING:
        return ""
    sign = "−" if change.share < 0 else "+"
    return (
        f"{name} {sign}{abs(change.share):.0%}, about {_range(change.now)} instead of "
        f"{_range(change.mended)} t/s"
    ).replace("%", " %")


def _range(speed: SpeedRange | None) -> str:
    if speed is None:
        return "unknown"
    return f"{_digits(speed.mid)} ({_digits(speed.low)}–{_digits(speed.high)})"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
