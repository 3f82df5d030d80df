"""The doctor's page: sections with their worst first, each fact with its mark, findings indented below it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qnext.doctor.values import LEVELS, Finding
from qnext.doctor.words import price_text
from qnext.pipeline.doctoring import Examination
from qnext.report.engine_words import engine_section, model_section
from qnext.report.machine_words import Row, Section, headline, machine_sections
from qnext.report.words import plural, workload_words

if TYPE_CHECKING:
    from rich.console import RenderableType

MARKS = {"error": "✗", "warning": "!", "info": "i", None: "·"}
_STYLES = {"error": "bold red", "warning": "bold yellow", "info": "bold cyan", None: "dim"}
_WELL = len(LEVELS)


def doctor_view(found: Examination) -> RenderableType:
    """The page. Sections and rows with findings come first, the worst first."""
    from rich.console import Group
    from rich.text import Text

    findings = found.findings
    parts: list[RenderableType] = [
        Text(headline(found.machine), style="bold"),
        Text(f"{summary(findings)}; prices are for {priced_for(found)}"),
    ]
    for section in sorted(sections_of(found), key=lambda one: min(_rank(row, findings) for row in one.rows)):
        parts += [Text(), Text(section.title, style="bold")]
        for row in sorted(section.rows, key=lambda one: _rank(one, findings)):
            parts += _row(row, [finding for finding in findings if finding.about == row.key])
    return Group(*parts)


def sections_of(found: Examination) -> list[Section]:
    """Machine, engine and models in rows."""
    sections = machine_sections(found.machine, found.case.header.file_bytes)
    if found.engine is not None:
        sections += [engine_section(found.engine, found.case), model_section(found.models)]
    return sections


def priced_for(found: Examination) -> str:
    """The model and the workload that prices are for."""
    return f"{found.case.model}, {workload_words(found.case.here.wishes.workload)}"


def summary(findings: Sequence[Finding]) -> str:
    """`2 warnings, 1 remark`; `nothing found that slows it down` without any."""
    words = {"error": "error", "warning": "warning", "info": "remark"}
    counts = [(sum(one.level == level for one in findings), words[level]) for level in LEVELS]
    told = [plural(count, word) for count, word in counts if count]
    return ", ".join(told) or "nothing found that slows it down"


def _rank(row: Row, findings: Sequence[Finding]) -> int:
    """Position of the row's worst finding among all, which are sorted; behind them all without one."""
    return next((at for at, one in enumerate(findings) if one.about == row.key), len(findings) + _WELL)


def _row(row: Row, findings: Sequence[Finding]) -> Iterator[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    level = findings[0].level if findings else None
    table = Table.grid(padding=(0, 1))
    table.add_column(width=3, justify="right")
    table.add_column(width=12, no_wrap=True)
    table.add_column(overflow="fold")
    value = Text(row.value)
    if row.meaning:
        value.append(f"  {row.meaning}", style="dim")
    table.add_row(Text(MARKS[level], style=_STYLES[level]), row.label, value)
    yield table
    for finding in findings:
        yield _finding(finding)


def _finding(finding: Finding) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    table.add_column(width=3)
    table.add_column(width=3, justify="right")
    table.add_column(overflow="fold")
    style = _STYLES[finding.level]
    table.add_row("", Text(MARKS[finding.level], style=style), Text(finding.what, style=style))
    table.add_row("", "", Text(finding.because))
    table.add_row("", "", Text(price_text(finding), style="magenta"))
    table.add_row("", Text("fix", style="green"), Text(finding.fix))
    return table
