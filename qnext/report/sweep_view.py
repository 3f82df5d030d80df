"""A sweep for people: a table that lives while it runs, lines for pipes, and what came of it."""

from __future__ import annotations

import shlex
import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qnext.report.words import chance, digits, interval, plural, shell_lines, speed, workload_words
from qnext.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Group, RenderableType
    from rich.table import Table

    from qnext.bench.verdict import Verdict
    from qnext.pipeline.sweep_cell_results import CellResult
    from qnext.pipeline.sweep_engine import Taken
    from qnext.pipeline.sweep_results import SweepEnd
    from qnext.pipeline.sweep_setup import Prepared
    from qnext.pipeline.sweep_values import Cell, Role
    from qnext.pipeline.sweeping import Progress

ROWS = 12
"""Cells that the live table shows: the fastest so far, and what was measured last."""
FINAL_ROWS = 10
REASONS = 6
_COLOURS = {"ok": "green", "winner": "green", "running": "cyan", "contender": ""}
_ROLES: dict[Role, str] = {"plan": "the plan", "fit": "llama.cpp's --fit", "defaults": "llama.cpp's defaults"}


@dataclass
class _Row:
    name: str
    baseline: bool
    status: str = "running"
    turns: list[float] = field(default_factory=list)
    prefills: list[float] = field(default_factory=list)
    decodes: list[float] = field(default_factory=list)

    @property
    def turn_s(self) -> float | None:
        return statistics.median(self.turns) if self.turns else None


class SweepBoard:
    """What is known while a sweep runs; `view` draws it. `seconds` is the budget."""

    def __init__(self, cells: Sequence[Cell], seconds: float) -> None:
        self._cells, self._seconds = len(cells), seconds
        self._plan = next((cell.name for cell in cells if "plan" in cell.roles), None)
        self._rows: dict[str, _Row] = {}
        self._latest: list[str] = []
        self._doing = "starting the engine"
        self.spent_s = 0.0
        self.loads = 0

    def tell(self, doing: str) -> None:
        """What is going on now."""
        self._doing = doing

    def add(self, cell: Cell, taken: Taken) -> None:
        """One more measurement."""
        row = self._rows.setdefault(cell.name, _Row(cell.name, bool(cell.roles)))
        row.status = "ok" if row.turns and taken.status == "noisy" else taken.status
        if taken.turn_ns:
            row.turns.append(taken.turn_ns / 1e9)
            if taken.prefill_ns and taken.prompt:
                row.prefills.append(taken.prompt * 1e9 / taken.prefill_ns)
            if taken.token_ns:
                row.decodes.append(1e9 / statistics.median(taken.token_ns))
        self._latest = [cell.name, *(name for name in self._latest if name != cell.name)]

    def gain(self, name: str) -> float | None:
        """The plan's time over the cell's, less one; None while one of them is not known."""
        row, plan = self._rows.get(name), self._rows.get(self._plan or "")
        if row is None or plan is None or row.turn_s is None or plan.turn_s is None:
            return None
        return plan.turn_s / row.turn_s - 1

    def view(self) -> Group:
        """The table as of now, at most 80 columns wide."""
        from rich.console import Group
        from rich.text import Text

        ranked = sorted((row for row in self._rows.values() if row.turn_s), key=lambda row: row.turn_s or 0.0)
        shown = dict.fromkeys(row.name for row in ranked[: ROWS // 2])
        shown |= dict.fromkeys(row.name for row in ranked if row.baseline)
        for name in self._latest:
            if len(shown) < ROWS:
                shown.setdefault(name)
        rows = sorted(
            (self._rows[name] for name in shown), key=lambda row: (row.turn_s is None, row.turn_s or 0.0)
        )
        left = max(0.0, self._seconds - self.spent_s)
        head = Text.assemble(
            (f"{len(self._rows)} of {self._cells} cells measured", "bold"),
            f", {plural(self.loads, 'load')}, {duration(self.spent_s)} spent, ",
            (f"{duration(left)} left", "bold"),
        )
        table = _table(("cell", "status", "prefill", "decode", "turn", "against the plan"))
        for row in rows:
            gain = self.gain(row.name)
            table.add_row(
                Text(row.name, style="bold" if row.baseline else ""),
                Text(row.status, style=_COLOURS.get(row.status, "yellow")),
                _figure(statistics.median(row.prefills) if row.prefills else None),
                _figure(statistics.median(row.decodes) if row.decodes else None),
                seconds_words(row.turn_s),
                _signed(gain),
            )
        return Group(head, table, Text(self._doing, style="dim"))


def measured_line(progress: Progress, gain: float | None) -> str:
    """One measurement as a line for a pipe."""
    taken = progress.taken
    if taken.turn_ns is None:
        figures = taken.because or "no figure"
    else:
        prefill = taken.prompt * 1e9 / taken.prefill_ns if taken.prompt and taken.prefill_ns else None
        decode = 1e9 / statistics.median(taken.token_ns) if taken.token_ns else None
        figures = (
            f"prefill {speed(prefill)}, decode {speed(decode)}, turn {seconds_words(taken.turn_ns / 1e9)}"
        )
        if gain is not None:
            figures += f", {_signed(gain)} against the plan"
    return f"{progress.number + 1} {progress.cell.name} ({progress.rung}): {taken.status}, {figures}"


def dry_run_view(prepared: Prepared) -> Group:
    """What a sweep would do: cells by forecast, those refused, loads and time."""
    from rich.console import Group
    from rich.text import Text

    live, settings = prepared.live, prepared.settings
    loads = len({cell.group for cell in live})
    table = _table(("cell", "load", "forecast of a turn", "range"))
    groups = {group: number + 1 for number, group in enumerate(dict.fromkeys(cell.group for cell in live))}
    for cell in live:
        low, mid, high = cell.predicted_s
        words = [cell.name, *(_ROLES[role] for role in cell.roles if _ROLES[role] != cell.name)]
        table.add_row(
            words[0],
            str(groups[cell.group]),
            seconds_words(mid),
            f"{seconds_words(low)}–{seconds_words(high)}",
        )
    parts: list[RenderableType] = [
        table,
        Text(),
        Text(
            f"{plural(len(live), 'cell')} on {plural(loads, 'way')} to load the model, at most "
            f"{settings.max_loads} loads; expected time {duration(settings.seconds)}. The search measures "
            "those that may be the fastest and leaves the others."
        ),
        Text(
            f"A short measurement reads {settings.short.prompt:,} tokens and writes "
            f"{settings.short.generate}, a full one {settings.full.prompt:,} and {settings.full.generate:,}, "
            f"after {settings.full.depth:,}; the turn is {workload_words(settings.workload)}."
        ),
    ]
    if (room := _two_at_once(live, settings.room)) is not None:
        parts.append(Text(room))
    refused = [cell for cell in prepared.cells if cell.status]
    if refused:
        parts += [Text(), Text("never run", style="bold")]
        parts += [Text(f"{cell.name}: {cell.status}, {cell.because}", style="dim") for cell in refused]
    return Group(*parts)


def _two_at_once(cells: Sequence[Cell], room: int) -> str | None:
    """Says so where two ways to load the model have room in memory together."""
    bytes_of = sorted({cell.group: cell.host_bytes for cell in cells}.values())
    if len(bytes_of) < 2 or not 0 < sum(bytes_of[:2]) <= room:
        return None
    return (
        f"Memory has room for the model twice ({format_bytes(sum(bytes_of[:2]))}): two ways to load it are "
        "compared in turns of a tenth of a second, so that whatever slows the machine strikes both."
    )


def sweep_view(end: SweepEnd, width: int = 80) -> Group:
    """The winner with its evidence, the fastest cells, the Pareto front, what was refused, what to run."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [
        Text.assemble(("fastest: ", "bold"), (end.winner.cell.name, "bold green")),
        *(Text(line) for line in verdict_lines(end)),
        Text(),
        _cells_table(end),
        Text(),
    ]
    if len(end.front) > 1:
        parts += [_front_table(end), Text()]
    failed = [one for one in end.results if one.status not in _HARMLESS]
    if failed:
        parts.append(Text("failed or refused", style="bold"))
        parts += [Text(line, style="dim") for line in _reasons(failed)]
        parts.append(Text())
    counts = Counter(one.status for one in end.results)
    told = ", ".join(f"{count} {word}" for word, count in counts.most_common())
    parts.append(Text(f"{len(end.results)} cells, {plural(end.loads, 'load')}: {told}", style="dim"))
    parts += [Text(), Text("The same with llama-server", style="bold")]
    environment = [f"{name}={value}" for name, value in end.winner.cell.environment.items()]
    words = [*environment, *(shlex.quote(word) for word in end.plan.argv)]
    parts += [Text(line) for line in shell_lines(words, width)]
    parts += [
        Text(),
        Text(
            f"Saved as tuned profile {end.profile.name}; qnext run {shlex.quote(end.sweep.model)} takes it "
            "from now on (--no-tuned: not)."
        ),
    ]
    return Group(*parts)


_HARMLESS = ("ok", "cannot-win", "not-reached", "waiting")


def verdict_lines(end: SweepEnd) -> list[str]:
    """What the test says of the winner against each baseline."""
    lines = []
    for role, (name, verdict) in end.against.items():
        label = _ROLES[role]
        if name == end.winner.cell.name:
            lines.append(f"{label}: this is the winner; nothing was shown to be faster")
        elif verdict is None:
            baseline = end.of_role(role)
            why = baseline.status if baseline is not None and baseline.status != "ok" else "no time was left"
            lines.append(f"against {label}: not tested ({why})")
        else:
            lines.append(f"against {label}: {_verdict_words(verdict)}")
    if end.likely is not None:
        lines.append(
            f"chosen all the same: with earlier measurements, {chance(end.likely)} likely to be faster"
        )
    lines += [
        f"against {label}: {_absence(end, role)}" for role, label in _ROLES.items() if role not in end.against
    ]
    return lines


def duration(seconds: float) -> str:
    """`45 s`, `9 min 30 s`, `1 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def seconds_words(seconds: float | None) -> str:
    """`1.28 s`, `340 ms`; a dash for None."""
    if seconds is None:
        return "–"
    return f"{digits(seconds)} s" if seconds >= 1 else f"{digits(seconds * 1e3)} ms"


def _absence(end: SweepEnd, role: Role) -> str:
    refused = next((one for one in end.results if one.cell.name.startswith(f"llama.cpp {role}")), None)
    if refused is not None:
        return f"not run: {refused.status}, {refused.because}"
    return "not run: it could not be asked here"


def _verdict_words(verdict: Verdict) -> str:
    between = interval(verdict.low, verdict.high, verdict.confidence, verdict.pairs)
    if verdict.word == "faster":
        return f"faster, {1 - verdict.ratio:.1%} less time ({between})"
    if verdict.word == "slower":
        return f"slower, {verdict.ratio - 1:.1%} more time ({between})"
    return f"no difference shown ({between})"


def _cells_table(end: SweepEnd) -> Table:
    from rich.text import Text

    ran = sorted((one for one in end.results if one.turn_s), key=lambda one: one.turn_s or 0.0)
    shown = ran[:FINAL_ROWS]
    shown += [one for one in ran[FINAL_ROWS:] if one.cell.roles or one is end.winner]
    table = _table(("cell", "n", "prefill", "decode", "turn", "against the plan"))
    for one in shown:
        style = "bold green" if one is end.winner else "bold" if one.cell.roles else ""
        table.add_row(
            Text(one.cell.name, style=style),
            str(one.count),
            _figure(one.prefill_tps),
            _figure(one.decode_tps),
            seconds_words(one.turn_s),
            _signed(None if one.gain is None else one.gain - 1),
        )
    if len(ran) > len(shown):
        table.caption = f"and {len(ran) - len(shown)} slower ones"
        table.caption_justify = "left"
    return table


def _front_table(end: SweepEnd) -> Table:
    table = _table(("no other beats it in all three", "prefill", "decode", "context"))
    by_name = {one.cell.name: one for one in end.results}
    for name in end.front[:FINAL_ROWS]:
        one = by_name[name]
        table.add_row(name, _figure(one.prefill_tps), _figure(one.decode_tps), f"{one.context:,}")
    return table


def _reasons(failed: Sequence[CellResult]) -> list[str]:
    """A line per reason, with the cells that share it; one for all that have no room."""
    groups: dict[tuple[str, str], list[CellResult]] = {}
    for one in failed:
        reason = "" if one.status == "does-not-fit" else one.because
        groups.setdefault((one.status, reason), []).append(one)
    lines = []
    for (status, _), cells in list(groups.items())[:REASONS]:
        first = cells[0]
        more = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
        because = f" ({first.because})" if first.because else ""
        lines.append(f"{status}: {first.cell.name}{because}{more}")
    if len(groups) > REASONS:
        lines.append(f"and {len(groups) - REASONS} other reasons")
    return lines


def _table(titles: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, title in enumerate(titles):
        left = number == 0 or title == "status"
        table.add_column(
            title, justify="left" if left else "right", no_wrap=number > 0, overflow="fold", ratio=None
        )
    return table


def _figure(tps: float | None) -> str:
    return "–" if tps is None else digits(tps)


def _signed(gain: float | None) -> str:
    return "–" if gain is None else f"{gain:+.1%}"
