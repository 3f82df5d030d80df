"""What `bench run --url` shows: a row per number of clients, in 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qnext.bench.endpoint import Level, Spread
from qnext.bench.endpoint_result import EndpointResult, result_warnings
from qnext.report.words import digits, local_time, plural

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

_LEGEND = (
    "TTFT: time to first token. Gap: between two chunks of text, at the median, 95 and 99 of 100.\n"
    "Prefill and decode: t/s of one request, median. In, out: t/s of all clients together."
)


def endpoint_view(result: EndpointResult) -> Group:
    """The server, its figures by number of clients, and what to know about them."""
    from rich.console import Group
    from rich.text import Text

    server = result.server
    headline = Text.assemble(
        (server.model or "a model without a name", "bold"),
        f" at {server.url}, {local_time(result.when)}, ",
        (result.status, "green" if result.status == "ok" else "yellow"),
    )
    software = " ".join(part for part in (server.software, server.build) if part) or "unnamed software"
    requests = plural(result.repetitions, "request")
    facts = (
        f"server {software}; {requests} per client, {result.prompt:,} tokens in, {result.generate:,} out, "
        f"greedy, {server.api} API, fresh text each time"
    )
    warnings = [Text(f"warning: {text}", style="yellow") for text in result_warnings(result)]
    return Group(
        headline,
        Text(facts, style="dim"),
        Text(),
        _table(result),
        Text(_LEGEND, style="dim"),
        *warnings,
    )


def level_line(level: Level) -> str:
    """One finished level in a line."""
    clients = plural(level.concurrency, "client")
    if level.ttft_ns is None:
        return f"{clients}: no request succeeded"
    decode = "–" if level.decode_tps is None else f"{digits(level.decode_tps.median)} t/s"
    total = "–" if level.output_tps is None else f"{digits(level.output_tps)} t/s"
    return (
        f"{clients}: first token after {_ms(level.ttft_ns.median)} ms "
        f"({_ms(level.ttft_ns.low)}–{_ms(level.ttft_ns.high)}), decode {decode}, together {total} out"
    )


def _table(result: EndpointResult) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    titles = ("clients", "TTFT ms", "low–high", "gap ms", "p95", "p99", "prefill", "decode", "in", "out")
    for title in (*titles, "failed") if any(level.failed for level in result.levels) else titles:
        table.add_column(title, justify="right", no_wrap=True)
    for level in result.levels:
        ttft, gap = level.ttft_ns, level.gap_ns
        table.add_row(
            str(level.concurrency),
            _ms(ttft.median if ttft else None),
            f"{_ms(ttft.low)}–{_ms(ttft.high)}" if ttft else "–",
            _ms(gap.median if gap else None),
            _ms(gap.p95 if gap else None),
            _ms(gap.p99 if gap else None),
            _median(level.prefill_tps),
            _median(level.decode_tps),
            _figure(level.input_tps),
            _figure(level.output_tps),
            *([str(len(level.failed))] if len(table.columns) > len(titles) else []),
        )
    return table


def _ms(time_ns: float | None) -> str:
    return "–" if time_ns is None else digits(time_ns / 1e6)


def _median(found: Spread | None) -> str:
    return _figure(found.median if found else None)


def _figure(value: float | None) -> str:
    return "–" if value is None else digits(value)
