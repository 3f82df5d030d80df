"""The engine and the models on this disk in rows, for the doctor's page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qnext.doctor.case import Case
from qnext.pipeline.doctoring import EngineState, KnownModel
from qnext.report.machine_words import Row, Section, instruction_words
from qnext.report.words import forecast
from qnext.units import format_bytes

_LAYOUTS = {
    "full": "repacked by the engine",
    "experts": "experts repacked, no AMX buffers",
    "off": "as in the file",
}
_MODELS_SHOWN = 12


def engine_section(engine: EngineState, case: Case) -> Section:
    """What is installed, what it is built for, and what else is here."""
    return Section("Engine", tuple(_engine_rows(engine, case)))


def _engine_rows(engine: EngineState, case: Case) -> Iterator[Row]:
    found = engine.installation
    if found is None:
        yield Row("engine.build", "package", "none", "models can be planned, not run")
    else:
        commit = f"llama.cpp {found.build.llama_commit}" if found.build.llama_commit else ""
        yield Row("engine.build", "package", f"{found.build.name} {found.build.version}", commit)
        rpc = "memory of other machines can be used" if found.rpc else "no RPC: this machine's memory alone"
        yield Row("engine.backends", "built for", ", ".join(found.build.backends) or "unknown", rpc)
        sets = engine.compiled.sets
        yield Row(
            "engine.instructions",
            "compiled in",
            instruction_words(sets) if sets is not None else "unknown",
            engine.compiled.reason,
        )
        layout = _LAYOUTS[engine.safe_layout] if engine.safe_layout else "not tried yet"
        meaning = (
            "probed: the fastest that does not crash" if engine.safe_layout else "the first run tries it"
        )
        yield Row("engine.layout", "layout", layout, meaning)
    for other in engine.others:
        where = f"{other.project}, {other.path or 'in this environment'}"
        devices = f", sees {'; '.join(other.devices)}" if other.devices else ""
        yield Row(
            f"engine.others.{other.name}",
            "beside it",
            f"{other.name} {other.version or ''}".strip(),
            where + devices,
        )
    names = ", ".join(variable.name for variable in case.variables)
    yield Row("engine.variables", "environment", names or "nothing that changes it")


def model_section(models: Sequence[KnownModel]) -> Section:
    """GGUFs on this disk with how fast they should run, the first dozen."""
    rows = [
        Row(
            f"models.{position}",
            _verdict(model),
            " ".join(word for word in (model.cached.repo, model.cached.quant) if word)
            or model.cached.path.name,
            f"{format_bytes(model.cached.size_bytes)}{_speed(model)}",
        )
        for position, model in enumerate(models[:_MODELS_SHOWN])
    ]
    if len(models) > _MODELS_SHOWN:
        rows.append(Row("models.more", "", f"and {len(models) - _MODELS_SHOWN} more", "qnext doctor --json"))
    return Section("Models", tuple(rows) or (Row("models", "on disk", "no GGUF in the usual caches"),))


def _verdict(model: KnownModel) -> str:
    if model.fits is None:
        return "?"
    return "runs" if model.fits else "too large"


def _speed(model: KnownModel) -> str:
    if model.prediction is None:
        return f", {model.reason}" if model.reason else ""
    return f", decode {forecast(model.prediction.decode_tps)}"
