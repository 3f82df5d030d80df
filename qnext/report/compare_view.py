"""Two records side by side: what may be said of their speeds, and what differs besides the knob."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qnext.report.words import local_time, speed
from qnext.units import format_bytes

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

    from qnext.pipeline.comparing_records import RecordComparison, TestComparison
    from qnext.store.differences import Difference
    from qnext.store.record import Record


def compare_view(found: RecordComparison) -> Group:
    """Who is compared, a row per test, what differs, and what that means, in 80 columns."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [
        _heading("baseline ", found.baseline),
        _heading("candidate", found.candidate),
    ]
    parts += [Text(), _tests_table(found.tests), Text()]
    for side, names in (("baseline", found.only_baseline), ("candidate", found.only_candidate)):
        if names:
            parts.append(Text(f"only in the {side}: {', '.join(names)}", style="dim"))
    if found.differences.differing:
        parts += [_differences_table(found), Text()]
    parts.append(_conclusion(found))
    if found.differences.unknown:
        fields = ", ".join(dict.fromkeys(fact.field for fact in found.differences.unknown))
        parts.append(Text(f"told by one of them alone, so not compared: {fields}", style="dim"))
    parts += [Text(line, style="dim") for line in _footnotes(found.tests)]
    return Group(*parts)


def _heading(role: str, record: Record) -> RenderableType:
    from rich.text import Text

    model = record.model_ref.rsplit("/", 1)[-1]
    named = record.identity.quant is None or record.identity.quant in model
    quant = "" if named else f" {record.identity.quant}"
    status = "" if record.status == "ok" else f", {record.status}: its finished tests alone"
    engine = record.identity.engine
    commit = f" ({engine.llama_commit})" if engine.llama_commit else ""
    return Text.assemble(
        (f"{role} {record.id[:8]}", "bold"),
        f"  {model}{quant}, {local_time(record.when)}",
        (status, "yellow"),
        (f"\n                    {engine.name} {engine.version}{commit}", "dim"),
    )


def _tests_table(tests: tuple[TestComparison, ...]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("test", "baseline", "candidate", "ratio", "99 % interval"):
        table.add_column(title, justify="left" if title == "test" else "right", no_wrap=True)
    table.add_column("candidate is")
    colours = {"faster": "green", "slower": "red"}
    for test in tests:
        interval = test.interval
        words = f"{test.word}: {test.why}" if test.why else test.word
        table.add_row(
            test.name,
            speed(test.baseline_tps),
            speed(test.candidate_tps),
            f"{test.ratio:.3f}",
            "–" if interval is None else f"{interval.low:.3f}–{interval.high:.3f}",
            Text(words, style=colours.get(test.word, "")),
        )
    return table


def _differences_table(found: RecordComparison) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("differs", "baseline", "candidate"):
        table.add_column(title, overflow="fold")
    for fact in found.differences.differing:
        meant = fact.knob not in found.confounded
        name = Text(fact.field if fact.knob in fact.field else f"{fact.field} ({fact.knob})")
        if meant:
            name.append(" ← knob", style="dim")
        table.add_row(name, _shown(fact, fact.a), _shown(fact, fact.b))
    return table


def _conclusion(found: RecordComparison) -> RenderableType:
    from rich.text import Text

    same = [knob for knob in found.knobs if knob not in found.differences.knobs]
    same = [knob for knob in same if all(fact.field != knob for fact in found.differences.differing)]
    if found.confounded:
        several = len(found.confounded) > 1 or bool(found.knobs)
        besides = f" besides {', '.join(found.knobs)}" if found.knobs else ""
        text = (
            f"CONFOUNDED: {', '.join(found.confounded)} {'differ' if several else 'differs'}{besides}, so no "
        )
        return Text(text + "difference in speed can be put down to one of them.", style="bold yellow")
    if same:
        return Text(f"{', '.join(same)} is the same in both.", style="yellow")
    if found.knobs:
        return Text(f"Only {', '.join(found.knobs)} differs.")
    return Text("Nothing known differs: these are two runs of the same.")


def _footnotes(tests: tuple[TestComparison, ...]) -> list[str]:
    from qnext.pipeline.comparing_records import TOO_FEW

    assumed = any(test.assumed for test in tests)
    lines = ["ratio: speed of the candidate over that of the baseline; below 1 it is slower."]
    if any(test.why == TOO_FEW for test in tests):
        lines.append("Fewer than 5 samples on each side show nothing at 99 %: measure with -r 5.")
    if assumed:
        lines.append(
            "How far equal runs differ on this machine is not known; taken is how far the samples of one run "
            "do, 3 % at least: measure one of the two three times, and it will be known."
        )
    return lines


def _shown(fact: Difference, value: Any) -> str:
    """A value short enough for a cell: sizes in units, long digests by their beginning."""
    if fact.field.startswith("bandwidth.") and isinstance(value, int):
        return f"{value / 1e9:.1f} GB/s"
    if fact.field == "model_bytes" and isinstance(value, int):
        return format_bytes(value)
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        whole = all(type(entry) is int for entry in value)
        return _ranges(value) if whole else ", ".join(map(str, value)) or "none"
    text = str(value)
    if fact.field in ("model_digest", "header_digest", "machine"):
        return text.rpartition(":")[2][:16]
    return text if len(text) <= 120 else text[:119] + "…"


def _ranges(numbers: list[int]) -> str:
    """`12–47`, `0, 2–5`; `none` for no number."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in parts) or "none"


def compare_to_dict(found: RecordComparison) -> dict[str, Any]:
    """`qnext.compare/1`: baseline and candidate by id, tests with a verdict each, differences, confounded."""
    return {
        "schema": "qnext.compare/1",
        "baseline": _who(found.baseline),
        "candidate": _who(found.candidate),
        "tests": [_test_to_dict(test) for test in found.tests],
        "only_baseline": list(found.only_baseline),
        "only_candidate": list(found.only_candidate),
        "knobs": list(found.knobs),
        "confounded": bool(found.confounded),
        "confounded_by": list(found.confounded),
        "differences": [_fact_to_dict(fact) for fact in found.differences.differing],
        "unknown": [_fact_to_dict(fact) for fact in found.differences.unknown],
    }


def _who(record: Record) -> dict[str, Any]:
    return {
        "id": record.id,
        "when": record.when,
        "status": record.status,
        "kind": record.kind,
        "model": record.model_ref,
    }


def _test_to_dict(test: TestComparison) -> dict[str, Any]:
    interval = test.interval
    return {
        "name": test.name,
        "baseline_tps": test.baseline_tps,
        "candidate_tps": test.candidate_tps,
        "ratio": test.ratio,
        "low": interval and interval.low,
        "high": interval and interval.high,
        "confidence": interval and interval.confidence,
        "equal_runs": test.equal_runs,
        "equal_runs_assumed": test.assumed,
        "verdict": test.word,
        "why": test.why or None,
    }


def _fact_to_dict(fact: Difference) -> dict[str, Any]:
    return {"knob": fact.knob, "field": fact.field, "baseline": fact.a, "candidate": fact.b}
