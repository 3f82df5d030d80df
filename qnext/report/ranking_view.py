"""The catalogue's models for one machine, the best first: two lines for what is planned, one for the rest.

Written for 80 columns: the first line has the figures, the second what lies where.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qnext.pipeline.ranking import TIERS, Ranked, Ranking, Tier
from qnext.report.words import digits, forecast
from qnext.units import GIB

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qnext.plan.values import SpeedRange

_TITLES: dict[Tier, tuple[str, str]] = {
    "good": ("Fits and answers fast enough", "bold green"),
    "by size": ("Fits by size, an estimate: no speed is forecast", "bold"),
    "slow or poor": ("Fits, but slow or in a poor quant", "bold yellow"),
    "too large": ("Does not fit", "bold red"),
}


def ranking_view(ranking: Ranking) -> RenderableType:
    """A list in groups. 80 columns."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    width = max((len(one.model.name) for one in ranking.entries), default=0)
    head = f"{'model':<{width}} {'quant':<10} {'GiB':>5} {'decode t/s':>16} quality"
    parts: list[RenderableType] = [Text(head, style="bold")]
    for tier in TIERS:
        entries = [one for one in ranking.entries if one.tier == tier]
        if entries:
            title, style = _TITLES[tier]
            parts += [Text(), Text(title, style=style)]
        for one in entries:
            parts.append(Text(_line(one, width), style="dim" if tier == "too large" else ""))
            if one.candidate.fits and one.basis != "size":
                parts.append(Padding(Text(_details(one), style="dim"), (0, 0, 0, 2), expand=False))
    parts += [Text(), Text(f"Order: {ranking.order}", style="dim")]
    best = ranking.best()
    if best is not None:
        parts.append(Text(f"The first one in full: qnext plan {best.ref}", style="dim"))
    if any(not one.model.quants and one.basis == "size" for one in ranking.entries):
        parts.append(Text("~ reckoned from bits per weight, published sizes not being known.", style="dim"))
    if any(one.basis == "size" for one in ranking.entries):
        parts.append(Text("--online plans those judged by size from their published headers.", style="dim"))
    return Group(*parts)


def _line(one: Ranked, width: int) -> str:
    candidate = one.candidate
    about = "" if one.listed or one.basis == "shape" else "~"
    size = f"{about}{candidate.size_bytes / GIB:.1f}"
    if candidate.fits:
        speed = _range(candidate.prediction.decode_tps if candidate.prediction else None)
    else:
        speed = f"{sum(candidate.missing.values()) / GIB:.1f} GiB short"
    return f"{one.model.name:<{width}} {candidate.quant:<10} {size:>5} {speed:>16} {candidate.word}"


def _details(one: Ranked) -> str:
    candidate = one.candidate
    prefill = candidate.prediction.prefill_tps if candidate.prediction else None
    ceiling = f"context {candidate.context_ceiling:,}, " if candidate.context_ceiling else ""
    return f"{candidate.where}, {ceiling}prefill {forecast(prefill)}"


def _range(speed: SpeedRange | None) -> str:
    return f"{digits(speed.mid)} ({digits(speed.low)}–{digits(speed.high)})" if speed else "not forecast"
