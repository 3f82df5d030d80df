"""Why a plan is as it is: every reason with its numbers, the next best, and what would change it most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qnext.plan.levers import Lever, RunnerUp
from qnext.plan.plan import Plan
from qnext.report.words import forecast
from qnext.units import format_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType


def explain_view(plan: Plan, second: RunnerUp | None, levers: Sequence[Lever]) -> RenderableType:
    """Numbers of each reason, then the next best placement, then what a better machine would bring."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = [Text("In numbers", style="bold")]
    for reason in plan.reasons:
        if reason.numbers:
            told = ", ".join(
                f"{_words(name)} {_value(name, value)}" for name, value in reason.numbers.items()
            )
            parts.append(Padding(Text(f"{reason.what}: {told}"), (0, 0, 0, 2)))
    parts += [Text(), Text("Next best", style="bold")]
    told = f"{second.words}: {_longer(second.loss)}" if second else "no other"
    parts.append(Padding(Text(told), (0, 0, 0, 2)))
    parts += [Text(), Text("What would change it most", style="bold")]
    if not levers:
        parts.append(Padding(Text("none of the usual steps shortens the turn"), (0, 0, 0, 2)))
        return Group(*parts)
    table = Table(box=None, pad_edge=False, show_header=True, header_style="bold")
    for title in ("turn", "decode", "change", "--what-if"):
        table.add_column(title, no_wrap=title in ("turn", "decode"))
    for lever in levers:
        gain = "fits" if lever.gain is None else f"−{lever.gain:.0%}".replace("%", " %")
        table.add_row(gain, forecast(lever.prediction.decode_tps), lever.words, lever.what_if)
    parts.append(Padding(table, (0, 0, 0, 2)))
    return Group(*parts)


def _longer(loss: float) -> str:
    if loss < 0:
        return f"the turn takes {-loss:.1%} less, which is not worth rounding the cache".replace("%", " %")
    return f"the turn takes {loss:.1%} longer".replace("%", " %")


def _words(name: str) -> str:
    for ending in ("_bytes", "_bps", "_ms"):
        name = name.removesuffix(ending)
    return name.replace("_", " ")


def _value(name: str, value: float | int | str) -> str:
    if isinstance(value, str):
        return value
    if name.endswith("_bytes") or "_bytes_" in name:
        return format_bytes(int(value))
    if name.endswith("_bps"):
        return f"{value / 1e9:.1f} GB/s"
    if name.endswith("_ms"):
        return f"{value:.2f} ms"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
