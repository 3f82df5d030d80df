"""Records for people: predicted, allocated and measured side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qnext.pipeline.conversation import Turn
from qnext.plan.plan import Plan
from qnext.plan.values import DeviceMemory
from qnext.report.words import digits, forecast, plural, speed
from qnext.store.record import Record, TestResult
from qnext.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Group, RenderableType


def record_view(record: Record, *, samples: bool = False) -> Group:
    """One record: identity, tests with forecasts, memory; with `samples` every raw time."""
    from rich.console import Group
    from rich.text import Text

    engine = record.identity.engine
    headline = Text.assemble(
        (record.model_ref, "bold"),
        f"  {record.identity.quant or ''}  {record.when}  ",
        (record.status, "green" if record.status == "ok" else "yellow"),
        f"  id {record.id}",
    )
    identity = Text(
        f"{engine.name} {engine.version} (llama.cpp {engine.llama_commit or 'unknown'}), machine "
        f"{record.identity.machine}, placement {record.identity.placement}",
        style="dim",
    )
    parts: list[RenderableType] = [headline, identity, Text(), tests_table(record.tests), Text()]
    parts.append(memory_comparison(record.planned, record.allocated))
    if samples:
        for test in record.tests:
            times = ", ".join(f"{ns / 1e6:.1f}" for ns in test.samples_ns)
            parts.append(Text(f"{test.name} samples (ms): {times}"))
    if record.error:
        parts.append(Text(f"error: {record.error}", style="red"))
    parts += [Text(f"warning: {warning}", style="yellow") for warning in record.warnings]
    return Group(*parts)


def run_view(record: Record) -> Group:
    """After `qnext run`: the same tables, with where the record is kept."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [
        Text(),
        tests_table(record.tests),
        Text(),
        memory_comparison(record.planned, record.allocated),
    ]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in record.warnings]
    parts.append(Text(f"recorded: qnext bench show {record.id}", style="dim"))
    return Group(*parts)


def tests_table(tests: Sequence[TestResult]) -> RenderableType:
    """A row per test: measured median and spread, forecast, share of the bandwidth ceiling."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("test", "measured", "low–high", "predicted", "RAM bandwidth"):
        table.add_column(title, justify="left" if title == "test" else "right")
    for test in tests:
        spread = f"{digits(test.low_tps)}–{digits(test.high_tps)}" if len(test.samples_ns) > 1 else "1 sample"
        share = "–" if test.bandwidth_share is None else f"{test.bandwidth_share:.0%}"
        table.add_row(test.name, speed(test.median_tps), spread, forecast(test.predicted_tps), share)
    return table


def memory_comparison(planned: Sequence[DeviceMemory], allocated: Sequence[DeviceMemory]) -> RenderableType:
    """Planned against allocated bytes, part by part, for each device."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("memory")
    for title in ("weights", "KV", "state", "compute", "other", "total"):
        table.add_column(title, justify="right")
    for label, devices in (("planned", planned), ("allocated", allocated)):
        for device in devices:
            table.add_row(
                f"{device.name} {label}",
                format_bytes(device.weights_bytes),
                format_bytes(device.kv_bytes),
                format_bytes(device.recurrent_bytes),
                format_bytes(device.compute_bytes),
                format_bytes(device.other_bytes),
                format_bytes(device.total_bytes),
            )
    return table


def test_line(test: TestResult) -> str:
    """One finished test in a line."""
    return (
        f"{test.name}: {speed(test.median_tps)} ({digits(test.low_tps)}–{digits(test.high_tps)}, "
        f"{plural(len(test.samples_ns), 'sample')}), predicted {forecast(test.predicted_tps)}"
    )


def turn_line(turn: Turn, plan: Plan) -> str:
    """The line after an answer: prefill and decode, predicted against measured."""
    fresh = turn.prompt_tokens - turn.cached_tokens
    cached = f" (+{turn.cached_tokens} cached)" if turn.cached_tokens else ""
    return (
        f"prefill {fresh}{cached} tokens at {speed(turn.prefill_tps)}, predicted "
        f"{forecast(plan.prediction.prefill_tps)}; decode {turn.generated} tokens at "
        f"{speed(turn.decode_tps)}, predicted {forecast(plan.prediction.decode_tps)}"
    )


def history_view(records: Sequence[Record]) -> RenderableType:
    """One line per test of each record, newest first."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("id", "when", "model", "test", "measured", "status"):
        table.add_column(title, justify="right" if title == "measured" else "left", no_wrap=title != "model")
    for record in records:
        for number, test in enumerate(record.tests or (None,)):
            first = number == 0
            table.add_row(
                record.id[:8] if first else "",
                record.when[:16].replace("T", " ") if first else "",
                record.model_ref.rsplit("/", 1)[-1] if first else "",
                test.name if test else "–",
                speed(test.median_tps) if test else "–",
                record.status if first else "",
            )
    return table
