"""Figures as they were last measured: claims/FIGURES.md, a row per claim (`scripts/claims --record`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from claims import Claim, Figure

PAGE = Path(__file__).with_name("FIGURES.md")
_HEAD = "| claim | figure | bar | verdict | machine | how |\n|---|---|---|---|---|---|\n"


def shown(figure: Figure | None) -> str:
    """The value with its unit."""
    return f"{figure.value:.4g} {figure.unit}" if figure else "-"


def record(one: Claim, figure: Figure | None, verdict: str, detail: str, machine: str) -> str:
    """The row of a claim that was measured."""
    cells = (one.name, shown(figure), one.bar, verdict.lower(), machine, detail or "-")
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |\n"


def write(row: str, order: Sequence[Claim]) -> None:
    """Put the row in the place of the one that the page has of its claim; rows are ordered as `order` is."""
    text = PAGE.read_text()
    before, _, rest = text.partition(_HEAD)
    lines = [line for line in rest.splitlines(keepends=True) if line.startswith("|")]
    rows = {line.split(" | ")[0][2:]: line for line in (*lines, row)}
    names = [one.name for one in order]
    ordered = sorted(rows, key=lambda name: names.index(name) if name in names else len(names))
    after = "".join(rest.splitlines(keepends=True)[len(lines) :])
    PAGE.write_text(before + _HEAD + "".join(rows[name] for name in ordered) + after)
