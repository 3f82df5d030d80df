"""Records for people: predicted, allocated and measured side by side, in 80 columns."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from qnext.plan.values import DeviceMemory, SpeedRange, Workload
from qnext.report.words import MEMORY_PARTS, digits, forecast, local_time, plural, scenario_words, speed
from qnext.store.record import Record, TestResult
from qnext.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Group, RenderableType

    from qnext.bench.accuracy import Accuracy
    from qnext.pipeline.conversation import Turn
    from qnext.pipeline.planning import PlannedModel

_LEGEND = "pp: prefill, reading the prompt. tg: decode, writing the answer. @ d: tokens already in context."


def record_view(record: Record, *, samples: bool = False) -> Group:
    """One record: identity, tests with forecasts, memory; with `samples` every raw time."""
    from rich.console import Group
    from rich.text import Text

    engine, identity = record.identity.engine, record.identity
    quant = f" {identity.quant}" if identity.quant else ""
    headline = Text.assemble(
        (f"{record.model_ref}{quant}", "bold"),
        f", {local_time(record.when)}, ",
        (record.status, "green" if record.status == "ok" else "yellow"),
        f", record {record.id}",
    )
    commit = f", llama.cpp {engine.llama_commit}" if engine.llama_commit else ""
    digest = identity.model_digest.rsplit(":", 1)[-1][:16]
    facts = [
        f"engine {engine.name} {engine.version}{commit}",
        f"machine {identity.machine}, placement {identity.placement}, file {digest}",
        "command " + shlex.join((record.command[0], *record.command[2:])) if record.command else "",
    ]
    parts: list[RenderableType] = [headline, *(Text(fact, style="dim") for fact in facts if fact), Text()]
    if record.tests:
        parts += [speed_table(record.tests), Text(_LEGEND, style="dim"), Text()]
    parts.append(memory_comparison(record.planned, record.allocated))
    for test in record.tests if samples else ():
        times = ", ".join(f"{ns / 1e6:.1f}" for ns in test.samples_ns)
        parts.append(Text(f"{test.name} samples in ms: {times}"))
    if record.error:
        parts.append(Text(f"error: {record.error}", style="red"))
    parts += [Text(f"warning: {warning}", style="yellow") for warning in record.warnings]
    return Group(*parts)


def run_view(record: Record) -> Group:
    """After `qnext run` and for `/stats`: speeds and memory, with where the record is kept."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(), _answers_table(record.tests), Text()]
    parts.append(memory_comparison(record.planned, record.allocated))
    parts += [Text(f"warning: {warning}", style="yellow") for warning in record.warnings]
    parts.append(Text(f"recorded; see it again with: qnext bench show {record.id}", style="dim"))
    return Group(*parts)


def accuracy_view(found: Mapping[str, Accuracy | None]) -> RenderableType:
    """How far off forecasts were, a row for decode and one for prefill."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "tests", "median error", "largest", "inside range", "forecast / measured"):
        table.add_column(title, justify="right" if title else "left")
    for kind, one in found.items():
        if one is not None:
            shares = (f"{one.median_error:.1%}", f"{one.worst_error:.1%}", f"{one.inside:.0%}")
            table.add_row(kind, str(one.tests), *shares, f"{one.bias:.2f}")
    return table


def speed_table(tests: Sequence[TestResult]) -> RenderableType:
    """A row per test: measured median and spread, forecast, share of the bandwidth ceiling."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    shares = any(test.bandwidth_share is not None for test in tests)
    for title in ("test", "measured", "low–high", "predicted"):
        table.add_column(title, justify="left" if title == "test" else "right")
    if shares:
        table.add_column("of RAM's speed", justify="right")
    for test in tests:
        spread = f"{digits(test.low_tps)}–{digits(test.high_tps)}" if len(test.samples_ns) > 1 else "1 sample"
        share = [_share(test)] if shares else []
        table.add_row(test.name, speed(test.median_tps), spread, forecast(test.predicted_tps), *share)
    return table


def _answers_table(tests: Sequence[TestResult]) -> RenderableType:
    """The same for a conversation, where each test has one sample and words say more than `tg38 @ d62`."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("tokens (at depth)", "measured", "predicted"):
        table.add_column(title, justify="left" if title.startswith("tokens") else "right")
    for test in tests:
        what = scenario_words(test.prompt, test.generate, test.depth)
        table.add_row(what, speed(test.median_tps), forecast(test.predicted_tps))
    return table


def _share(test: TestResult) -> str:
    return "–" if test.bandwidth_share is None else f"{test.bandwidth_share:.0%}"


def memory_comparison(planned: Sequence[DeviceMemory], allocated: Sequence[DeviceMemory]) -> RenderableType:
    """Planned beside allocated bytes: a row per part, two columns per device."""
    from rich.table import Table

    real = {device.name: device for device in allocated}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("memory")
    for device in planned:
        table.add_column(f"{device.name}\nplanned", justify="right")
        table.add_column("\nallocated", justify="right")
    for word, field in MEMORY_PARTS:
        cells: list[str] = []
        for device in planned:
            there = real.get(device.name)
            cells.append(format_bytes(getattr(device, field)))
            cells.append("–" if there is None else format_bytes(getattr(there, field)))
        table.add_row(word, *cells, style="bold" if word == "total" else None)
    return table


def result_line(test: TestResult) -> str:
    """One finished test in a line."""
    return (
        f"{test.name}: {speed(test.median_tps)} ({digits(test.low_tps)}–{digits(test.high_tps)}, "
        f"{plural(len(test.samples_ns), 'sample')}), predicted {forecast(test.predicted_tps)}"
    )


def turn_line(turn: Turn, planned: PlannedModel) -> str:
    """The line after an answer: prefill and decode, measured beside predicted."""
    fresh = turn.prompt_tokens - turn.cached_tokens
    kept = f" (+{turn.cached_tokens:,} known)" if turn.cached_tokens else ""
    prefill = planned.forecast(Workload(fresh, 0, turn.cached_tokens)).prefill_tps
    decode = planned.forecast(Workload(0, turn.decodes, turn.prompt_tokens)).decode_tps
    return (
        f"prefill {plural(fresh, 'token')}{kept} {speed(turn.prefill_tps)}, predicted "
        f"{_mid(prefill)}; decode {plural(turn.decodes, 'token')} {speed(turn.decode_tps)}, "
        f"predicted {_mid(decode)}"
    )


def _mid(tps: SpeedRange | None) -> str:
    return "nothing" if tps is None else digits(tps.mid)


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
                local_time(record.when) if first else "",
                record.model_ref.rsplit("/", 1)[-1] if first else "",
                test.name if test else "–",
                speed(test.median_tps) if test else "–",
                record.status if first else "",
            )
    return table
