"""What `bench run --url` shows: a row per number of clients, in 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qnext.bench.endpoint import Level, Spread
from qnext.bench.endpoint_result import EndpointResult, EndpointServer, result_warnings
from qnext.report.words import digits, local_time, plural

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Group, RenderableType
    from rich.table import Table

_LEGEND = (
    "TTFT: time to first token. Gap: between two chunks of text, median; 95 and 99 of",
    "100 are shorter than p95 and p99. Prefill, decode: of one request, median.",
    "All in, all out: t/s of all clients together.",
)


def endpoint_view(result: EndpointResult) -> Group:
    """The server, its figures by number of clients, and what to know about them."""
    from rich.console import Group
    from rich.text import Text

    headline = Text.assemble(
        *served(result.server),
        f", {local_time(result.when)}, ",
        (result.status, "green" if result.status == "ok" else "yellow"),
    )
    requests = plural(result.repetitions, "request")
    facts = (
        f"{software_words(result.server)}\n"
        f"{requests} per client, {result.prompt:,} tokens in, {result.generate:,} out, greedy, fresh text"
    )
    return Group(
        headline,
        Text(facts, style="dim"),
        Text(),
        _times(result.levels),
        Text(),
        _speeds(result.levels),
        Text("\n".join(_LEGEND), style="dim"),
        *(Text(f"warning: {text}", style="yellow") for text in result_warnings(result)),
    )


def served(server: EndpointServer) -> tuple[tuple[str, str], str]:
    """The model and where it is, for `Text.assemble`."""
    return (server.model or "a model without a name", "bold"), f" at {server.url}"


def software_words(server: EndpointServer) -> str:
    """`server llama.cpp b8000-abc, chat API`."""
    software = " ".join(part for part in (server.software, server.build) if part) or "unnamed software"
    return f"server {software}, {server.api} API"


def level_line(level: Level) -> str:
    """One finished level in a line."""
    clients = plural(level.concurrency, "client")
    if level.ttft_ns is None:
        return f"{clients}: no request succeeded"
    decode = "–" if level.decode_tps is None else f"{digits(level.decode_tps.median)} t/s"
    total = "–" if level.output_tps is None else f"{digits(level.output_tps)} t/s"
    return (
        f"{clients}: first token after {ms(level.ttft_ns.median)} ms "
        f"({ms(level.ttft_ns.low)}–{ms(level.ttft_ns.high)}), decode {decode}, together {total} out"
    )


def _times(levels: Sequence[Level]) -> RenderableType:
    table = _table("clients", "TTFT ms", "low–high", "gap ms", "p95", "p99", "requests", "failed")
    for level in levels:
        ttft, gap = level.ttft_ns, level.gap_ns
        table.add_row(
            str(level.concurrency),
            ms(ttft.median if ttft else None),
            f"{ms(ttft.low)}–{ms(ttft.high)}" if ttft else "–",
            ms(gap.median if gap else None),
            ms(gap.p95 if gap else None),
            ms(gap.p99 if gap else None),
            f"{len(level.exchanges):,}",
            f"{len(level.failed):,}",
        )
    return table


def _speeds(levels: Sequence[Level]) -> RenderableType:
    table = _table("clients", "prefill t/s", "low–high", "decode t/s", "low–high", "all in", "all out")
    for level in levels:
        table.add_row(
            str(level.concurrency),
            *_figure_and_range(level.prefill_tps),
            *_figure_and_range(level.decode_tps),
            figure(level.input_tps),
            figure(level.output_tps),
        )
    return table


def _table(*titles: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def ms(time_ns: float | None) -> str:
    """Milliseconds without their unit; `–` for None."""
    return "–" if time_ns is None else digits(time_ns / 1e6)


def _figure_and_range(found: Spread | None) -> tuple[str, str]:
    return (
        ("–", "–") if found is None else (digits(found.median), f"{digits(found.low)}–{digits(found.high)}")
    )


def figure(value: float | None) -> str:
    return "–" if value is None else digits(value)
