"""The quants of a model beside each other: size, where it goes, how fast, how far, how good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qnext.plan.quants import Candidate
from qnext.report.words import digits
from qnext.units import GIB

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qnext.plan.values import SpeedRange


def candidates_view(candidates: Sequence[Candidate], taken: str) -> RenderableType:
    """A table with a row per quant, the best quality first; the one taken stands out. 80 columns."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("quant", "GiB", "decode t/s", "prefill", "context", "quality", "in RAM"):
        right = title in ("GiB", "decode t/s", "prefill", "context")
        table.add_column(title, justify="right" if right else "left", no_wrap=title != "in RAM")
    for one in candidates:
        chosen = one.quant == taken
        style = "bold green" if chosen else "" if one.fits else "dim"
        speed = one.prediction
        table.add_row(
            f"{'> ' if chosen else '  '}{one.quant}",
            f"{one.size_bytes / GIB:.1f}",
            _range(speed.decode_tps if speed else None),
            _middle(speed.prefill_tps if speed else None),
            f"{one.context_ceiling:,}" if one.context_ceiling else "",
            one.word,
            _short(one.where) if one.fits else f"{sum(one.missing.values()) / GIB:.1f} short",
            style=style,
        )
    notes = (
        "quality: published divergences where there are some, else bits per weight (--json says which). "
        "context: the longest that fits, up to what the model was trained for."
    )
    return Group(table, Text(notes, style="dim"))


def _short(where: str) -> str:
    """What of the model is in RAM: layers whose experts are, `none`, or `all`."""
    if where == "CPU":
        return "all"
    return "none" if where.startswith("all on") else where.removesuffix(" layers' experts in RAM")


def _range(speed: SpeedRange | None) -> str:
    return f"{digits(speed.mid)} ({digits(speed.low)}–{digits(speed.high)})" if speed else ""


def _middle(speed: SpeedRange | None) -> str:
    return digits(speed.mid) if speed else ""
