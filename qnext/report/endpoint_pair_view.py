"""What `bench run --url A --url B` shows: per number of clients a row per figure, in 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qnext.bench.endpoint_pair import METRICS, Metric, PairLevel
from qnext.bench.endpoint_pair_result import PairResult, pair_warnings
from qnext.report.endpoint_view import figure, ms, served, software_words
from qnext.report.words import local_time, plural

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

    from qnext.bench.verdict import Verdict

_NAMES: dict[Metric, str] = {
    "ttft": "TTFT ms",
    "gap": "longest gap ms",
    "per_token": "per token ms",
    "output_tps": "all out t/s",
}
_IN_LINE: dict[Metric, str] = {"ttft": "first token", "per_token": "per token", "output_tps": "all out"}
_COLOURS = {"faster": "green", "slower": "red"}
_LEGEND = (
    "TTFT: time to first token, the median client's. Longest gap: between two chunks",
    "of text, of all clients. Per token: after the first one, the median client's.",
    "All out: tokens of all clients together, from the first request to the last",
    "chunk. Figures are medians of the rounds. Ratio: the second's over the first's",
    "in a typical pair; under 1 the second takes less time, for t/s over 1 it makes",
    "more.",
)


def pair_view(result: PairResult) -> Group:
    """Both servers, a table per number of clients, and what to know about them."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    for name, side in zip(("first ", "second"), result.sides, strict=True):
        parts.append(Text.assemble(f"{name}  ", *served(side.server)))
        parts.append(Text(f"        {software_words(side.server)}", style="dim"))
    parts.append(
        Text.assemble(
            f"{local_time(result.when)}, ", (result.status, "green" if result.status == "ok" else "yellow")
        )
    )
    facts = (
        f"{plural(result.repetitions, 'round')} in drawn order, "
        f"{result.prompt:,} tokens in, {result.generate:,} out, greedy, fresh text"
    )
    parts.append(Text(facts, style="dim"))
    for level in result.levels:
        parts += [Text(), Text(_title(level), style="bold"), _table(level)]
    parts += [Text(), Text("\n".join(_LEGEND), style="dim")]
    parts += [Text(f"warning: {text}", style="yellow") for text in pair_warnings(result)]
    return Group(*parts)


def pair_level_line(level: PairLevel) -> str:
    """One finished level in a line."""
    clients = plural(level.concurrency, "client")
    if not level.comparisons:
        return f"{clients}: no pair of rounds, so nothing is compared"
    told = [
        f"{name} {found.ratio:.3f} ({found.word})"
        for metric, name in _IN_LINE.items()
        if (found := level.comparisons.get(metric))
    ]
    return f"{clients}, second to first: {', '.join(told)}"


def _title(level: PairLevel) -> str:
    title = f"{plural(level.concurrency, 'client')}: {level.status}, {plural(len(level.pairs), 'pair')}"
    reached = min((found.confidence for found in level.comparisons.values()), default=0.0)
    return f"{title}, intervals at {100 * reached:.0f} %" if reached else title


def _table(level: PairLevel) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("", "first", "second", "ratio", "interval", "second is"):
        table.add_column(title, justify="left" if title in ("", "second is") else "right", no_wrap=True)
    for metric, field in METRICS.items():
        found = level.comparisons.get(metric)
        shown = figure if metric == "output_tps" else ms
        table.add_row(
            _NAMES[metric],
            *(shown(getattr(median, field)) for median in level.medians),
            f"{found.ratio:.3f}" if found else "–",
            _interval(found),
            Text(found.word, style=_COLOURS.get(found.word, "")) if found else "–",
        )
    return table


def _interval(found: Verdict | None) -> str:
    return f"{found.low:.3f}–{found.high:.3f}" if found and found.confidence else "–"
