"""A sweep as one HTML file: what was found and how sure it is, how to start it, every cell, what was refused.

Nothing is fetched when the page is opened, and a policy in its head lets no script or style run but its own.
All that comes from outside (names of models, messages of engines) reaches the page through Jinja's escaping
or as text of an SVG element. A sweep that was cut short has no verdict, and the page says so rather than call
the fastest median a winner. Files are named by `$HOME` and paths in messages left out, because reports are
shown to others.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from qnext.hardware.redact import redact_machine, redact_text
from qnext.plan.export import flag_lines
from qnext.plan.values import CPU_REPACK
from qnext.report.html_figures import (
    CONTENDERS,
    forecast_figure,
    latency_figure,
    over_knob,
    pareto_figure,
    percentile,
)
from qnext.report.html_page import drawings, legend, render_page
from qnext.report.html_summary import (
    OBJECTIVES,
    ROLES,
    chosen_cell,
    comparisons_of,
    headline,
    warning,
)
from qnext.report.words import local_time, workload_words

if TYPE_CHECKING:
    from qnext.pipeline.sweep_cell_results import CellResult
    from qnext.pipeline.sweep_values import Cell, SweepSettings
    from qnext.store.record import Record
    from qnext.store.sweeps import StoredSweep

MEANINGS = {
    "ok": "measured and ranked",
    "does-not-fit": "needs more memory than there is: by arithmetic, or because less already ran out",
    "out-of-memory": "the engine got no more memory",
    "crashed": "the engine's process ended",
    "hung": "the engine said nothing for too long",
    "too-slow": "stopped, because it could not win any more",
    "noisy": "its steps differ too much to be ranked",
    "confounded": "the engine made something else than was asked",
    "cannot-win": "not measured: what was measured of its settings says that it cannot win",
    "not-reached": "not measured: it could have won, but the time was used up",
    "waiting": "not measured yet",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A cell as the table shows it. Times per token in ms, None where nothing was measured."""

    result: CellResult
    because: str
    chosen: bool
    labels: tuple[str, ...]
    token_ms: tuple[float, float, float, float] | None
    steps: int
    rss_bytes: int | None
    major_faults: int | None


def html_report(sweep: StoredSweep, record: Record | None) -> str:
    """The page. `record`, of machine and engine, is any that the sweep left; None where it left none."""
    from qnext.pipeline.sweep_cell_results import summarise_cells
    from qnext.pipeline.sweep_values import cell_from_dict, settings_from_dict

    settings = settings_from_dict(sweep.settings)
    cells = tuple(
        cell_from_dict(cell.name, cell.config, "" if cell.status == "waiting" else cell.status, cell.because)
        for cell in sweep.cells
    )
    results = summarise_cells(sweep, cells, None)
    chosen = chosen_cell(sweep, results)
    name = "" if chosen is None else chosen.cell.name
    comparisons = comparisons_of(sweep, results, settings)
    rows = _rows(sweep, results, name)
    pareto, front = pareto_figure(results)
    figures = [
        over_knob(results, name, "cpu experts", "Expert layers in RAM", "expert layers in RAM"),
        over_knob(results, name, "ubatch", "Tokens per batch", "ubatch", doubling=True),
        pareto,
        forecast_figure(results),
        latency_figure(_contenders(sweep, rows, name)),
    ]
    return render_page(
        "report.html.j2",
        sweep=sweep,
        settings=settings,
        model=_model_name(sweep.model),
        objective=OBJECTIVES[settings.objective],
        workload=workload_words(settings.workload),
        when=local_time(sweep.started_at),
        headline=headline(sweep, results, chosen, comparisons, settings),
        warning=warning(sweep, results),
        chosen=chosen,
        comparisons=comparisons,
        commands=[] if chosen is None else _commands(sweep, settings, chosen.cell),
        figures=[(figure, drawings(figure)) for figure in figures],
        legends=[legend(figure) for figure in figures],
        front=[one for one in results if one.cell.name in front],
        rows=rows,
        statuses=[word for word in MEANINGS if any(row.result.status == word for row in rows)]
        + sorted({row.result.status for row in rows} - set(MEANINGS)),
        meanings=MEANINGS,
        refused=_refused(rows),
        machine=_machine(record),
        identity=_identity(sweep, settings, record),
    )


def _rows(sweep: StoredSweep, results: Sequence[CellResult], chosen: str) -> tuple[Row, ...]:
    """Measured cells by their time, then the others as they were made."""
    found = []
    for place, one in enumerate(results):
        mine = [told for told in sweep.measurements if told.cell == place and told.status == "ok"]
        times = sorted(ns for told in mine for ns in told.token_ns)
        resident = [told.rss_bytes for told in mine if told.rss_bytes is not None]
        faults = [told.major_faults for told in mine if told.major_faults is not None]
        token_ms = None
        if times:
            median, p95, p99 = (percentile(times, share) / 1e6 for share in (0.5, 0.95, 0.99))
            token_ms = (median, p95, p99, times[-1] / 1e6)
        found.append(
            Row(
                one,
                redact_text(one.because),
                one.cell.name == chosen,
                tuple(ROLES[role] for role in one.cell.roles),
                token_ms,
                len(times),
                max(resident, default=None),
                max(faults, default=None),
            )
        )
    return tuple(sorted(found, key=lambda row: (row.result.turn_s is None, row.result.turn_s or 0.0)))


def _contenders(sweep: StoredSweep, rows: Sequence[Row], chosen: str) -> list[tuple[str, list[int]]]:
    """Steps of the chosen cell, of the baselines and of the fastest others."""
    ranked = [row for row in rows if row.steps]
    ranked.sort(key=lambda row: (not row.chosen, not row.labels))  # stable: by time within
    places = {cell.name: place for place, cell in enumerate(sweep.cells)}
    found = []
    for row in ranked[:CONTENDERS]:
        place = places[row.result.cell.name]
        told = [one for one in sweep.measurements if one.cell == place and one.status == "ok"]
        found.append((row.result.cell.name, [ns for one in told for ns in one.token_ns]))
    return found


def _refused(rows: Sequence[Row]) -> list[tuple[str, int, list[tuple[str, list[str]]]]]:
    """(status, cells, reasons with the names that share them) of all that is not ranked."""
    groups: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if row.result.status != "ok":
            groups.setdefault(row.result.status, {}).setdefault(row.because, []).append(row.result.cell.name)
    order = list(MEANINGS)
    return [
        (status, sum(map(len, reasons.values())), list(reasons.items()))
        for status, reasons in sorted(
            groups.items(), key=lambda entry: order.index(entry[0]) if entry[0] in order else -1
        )
    ]


def _commands(sweep: StoredSweep, settings: SweepSettings, cell: Cell) -> list[tuple[str, str]]:
    """(what it is, the command) for a shell."""
    found = []
    if (sweep.result or {}).get("profile"):
        found.append(("With the saved profile", _shell(["qnext", "run", settings.request.model])))
    found.append(("With every setting named", _shell(run_words(settings.request.model, cell), cell)))
    server = (sweep.result or {}).get("llama_server_argv")
    if server:
        found.append(("With llama-server", _shell(server, cell)))
    return found


def run_words(model: str, cell: Cell) -> list[str]:
    """`qnext run` with a flag for everything that a sweep may choose."""
    chosen = cell.placement
    layout = "off"
    if chosen.extra_buffers:
        layout = "full"
    elif any(rule.buffer == CPU_REPACK for rule in chosen.overrides):
        layout = "experts"
    words = ["qnext", "run", model, "--no-tuned"]
    if chosen.rpc_servers:
        words += ["--rpc", ",".join(chosen.rpc_servers)]
    if chosen.devices:
        words += ["-ngl", str(chosen.n_gpu_layers)]
    moved = chosen.cpu_expert_layers
    placed = [rule for rule in chosen.overrides if rule.buffer != CPU_REPACK]
    if moved == tuple(range(len(moved))) and moved and len(placed) == 1:
        words += ["-ncmoe", str(len(moved))]
    else:
        words += [word for rule in placed for word in ("-ot", f"{rule.pattern}={rule.buffer}")]
    if chosen.tensor_split is not None:
        words += ["-ts", ",".join(f"{share:.9g}" for share in chosen.tensor_split)]
    words += ["-c", str(chosen.context), "-b", str(chosen.batch), "-ub", str(chosen.ubatch)]
    words += ["-ctk", chosen.kv_type_k, "-ctv", chosen.kv_type_v, "-fa", chosen.flash_attention]
    words += ["-t", str(chosen.threads), "-tb", str(chosen.threads_batch)]
    return [*words, "-lm", chosen.load_mode, "--repack", layout]


def _shell(words: Sequence[str], cell: Cell | None = None) -> str:
    """Quoted for a POSIX shell, a flag per line; the home folder as `$HOME`."""
    home = f"{Path.home()}/"
    quoted = [
        f'"$HOME"/{shlex.quote(word.removeprefix(home))}' if word.startswith(home) else shlex.quote(word)
        for word in words
    ]
    before = (
        ""
        if cell is None
        else "".join(f"{key}={shlex.quote(value)} " for key, value in cell.environment.items())
    )
    lines = flag_lines(quoted)
    return before + " \\\n  ".join(lines)


def _model_name(model: str) -> str:
    """The file's name for a path; a name stays."""
    return PurePath(model).name if model.endswith(".gguf") else model


def _machine(record: Record | None) -> list[tuple[str, list[tuple[str, str]]]]:
    """(part of the machine, its facts) of the machine that was measured."""
    if record is None or not record.machine:
        return []
    from qnext.hardware import machine_from_dict
    from qnext.report.machine_words import machine_sections

    machine = redact_machine(machine_from_dict(record.machine))
    return [
        (section.title, [(row.label, row.value) for row in section.rows])
        for section in machine_sections(machine)
    ]


def _identity(sweep: StoredSweep, settings: SweepSettings, record: Record | None) -> list[tuple[str, str]]:
    """What has to be equal for these figures to be comparable with others."""
    facts: dict[str, Any] = {
        "sweep": sweep.id,
        "started (UTC)": sweep.started_at,
        "model": _model_name(sweep.model),
        "model digest": sweep.model_digest,
        "machine": sweep.machine,
        "engine build": sweep.engine_build,
        "objective": f"time {OBJECTIVES[settings.objective]}: {workload_words(settings.workload)}",
        "budget": f"{settings.seconds:,.0f} s" + (f", {settings.cells} cells" if settings.cells else ""),
        "loads": (sweep.result or {}).get("loads"),
        "confidence": f"{settings.confidence:.0%}",
        "seed": sweep.seed,
    }
    if record is not None:
        identity = record.identity
        engine = identity.engine
        facts |= {
            "quant": identity.quant,
            "header digest": identity.header_digest,
            "model type": identity.model_type,
            "engine": f"{engine.name} {engine.version}",
            "llama.cpp commit": engine.llama_commit,
            "build flags": engine.flags,
            "devices": None if identity.devices is None else ", ".join(identity.devices) or "CPU alone",
            "driver": identity.driver,
            "measured bandwidths": _pairs(identity.bandwidths, " B/s"),
            "power": _pairs(identity.power),
            "environment": _pairs(identity.environment),
        }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


def _pairs(facts: Mapping[str, object] | None, unit: str = "") -> str | None:
    if facts is None:
        return None
    return ", ".join(
        f"{name} {value:,}{unit}" if isinstance(value, int) and unit else f"{name} {value}"
        for name, value in facts.items()
    )
