"""The trip of `qnext doctor`: look, measure if asked, examine. Nothing is sent anywhere.

A quick examination reads, and starts nothing but what answers within its deadline; what a full one measured
is remembered and used from then on, by `qnext plan` too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qnext.config import Paths
from qnext.doctor.case import Case, Circumstances
from qnext.doctor.examine import examine
from qnext.doctor.values import EngineFacts, Finding, Variable, finding_to_dict
from qnext.doctor.words import price_text
from qnext.engine.build import (
    DISTRIBUTION,
    GPU_KINDS,
    PINNED_VERSION,
    Installation,
    inspect_installation,
    missing_prerequisites,
    rebuild_command,
)
from qnext.engine.environment import Inherited, inherited
from qnext.engine.instructions import CompiledSets, compiled_sets, instructions_entry
from qnext.engine.others import OtherEngine, find_other_engines
from qnext.engine.probe import known_policy
from qnext.errors import QnextError, UsageError
from qnext.hardware import Machine, detect_machine, load_machine, machine_fingerprint, machine_to_dict
from qnext.hardware.machine import has_integrated_gpu
from qnext.models.gguf_reader import read_header
from qnext.models.header import ModelHeader
from qnext.models.hub_cache import CachedModel, find_cached, hub_folder
from qnext.models.shape import read_shape
from qnext.models.synth import SHAPES
from qnext.models.synth.imagined import imagined_header
from qnext.pipeline.engine_devices import add_engine_gpus
from qnext.pipeline.locate import locate_model
from qnext.pipeline.measurements import recall_measurements
from qnext.pipeline.request import Request
from qnext.pipeline.surroundings import Notice, layout_entry
from qnext.plan.options import RepackPolicy, Wishes
from qnext.plan.values import Prediction

DEFAULT_MODEL = "qwen3-next-80b-a3b:Q4_K_M"
_DEFAULT_QUANT = "Q4_K_M"
_TITLES = {"qwen3-next-80b-a3b": "Qwen3-Next-80B-A3B", "qwen3-30b-a3b": "Qwen3-30B-A3B"}

LOOK_AT_MODELS_S = 0.4
"""How long cached models are looked at; those left over are listed without a verdict."""

Show = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A GGUF on this disk. `fits` and `prediction` are None where it was not looked at, `reason` says why."""

    cached: CachedModel
    fits: bool | None = None
    prediction: Prediction | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class EngineState:
    """The installed engine and what is around it; for a recorded machine there is none."""

    installation: Installation | None
    compiled: CompiledSets
    safe_layout: RepackPolicy | None
    others: tuple[OtherEngine, ...]
    variables: tuple[Inherited, ...]


@dataclass(frozen=True, slots=True)
class Examination:
    """All that the doctor saw and found. `case` holds the machine and the model that prices are for."""

    case: Case
    findings: tuple[Finding, ...]
    engine: EngineState | None
    models: tuple[KnownModel, ...]

    @property
    def machine(self) -> Machine:
        """The machine, with what was measured."""
        return self.case.machine


def examine_machine(
    request: Request,
    paths: Paths,
    *,
    named: bool = False,
    full: bool = False,
    notice: Notice,
    show: Show | None = None,
) -> Examination:
    """Examine this machine, or a recorded one (`request.hardware`), for `request.model`.

    `named`: the user chose the model, so that not being able to run it is an error. `full` measures; `show`
    is called with its progress. Raises ModelError or UsageError for a model that cannot be read.
    """
    if full and request.hardware:
        raise UsageError("--full measures this machine, not a recorded one", hint="Leave out --hardware.")
    label, header, on_disk = _model(request.model, paths)
    machine, engine = _recorded(request, paths) if request.hardware else _here(_model_folder(header), paths)
    if full and engine is not None:
        from qnext.pipeline.measuring import measure_machine

        build = engine.installation.build if engine.installation else None
        machine, layout = measure_machine(
            machine, build, _model_folder(header), paths, notice, show or (lambda share, what: None)
        )
        engine = replace(engine, safe_layout=layout or engine.safe_layout)
    facts = _facts(engine, machine)
    case = Case(
        here=Circumstances(
            machine=machine,
            wishes=Wishes(**request.wishes()),
            threads=request.threads,
            threads_batch=request.threads_batch,
            repack=request.repack,
            ram=request.ram,
            vram=request.vram,
            device_memory=request.device_memory,
            rpc_servers=request.rpc_servers,
            backends=facts.backends if facts and facts.build else None,
            compiled_sets=facts.compiled_sets if facts else None,
        ),
        model=label,
        header=header,
        shape=read_shape(header),
        engine=facts,
        variables=_variables(engine),
        named=named,
        on_disk=on_disk,
    )
    models = _known_models(case) if engine is not None else ()
    if not case.on_disk:
        case = replace(case, on_disk=any(_is_it(model.cached, request.model) for model in models))
    return Examination(case, examine(case), engine, models)


def examination_to_dict(found: Examination) -> dict[str, Any]:
    """The `qnext.doctor/1` document."""
    engine = found.engine
    return {
        "schema": "qnext.doctor/1",
        "model": found.case.model,
        "workload": asdict(found.case.here.wishes.workload),
        "machine": machine_to_dict(found.machine),
        "engine": _engine_to_dict(engine) if engine is not None else None,
        "models": [_model_to_dict(model) for model in found.models],
        "findings": [finding_to_dict(one, price_text(one)) for one in found.findings],
    }


def _recorded(request: Request, paths: Paths) -> tuple[Machine, None]:
    assert request.hardware is not None
    return load_machine(request.hardware, paths.hardware_dir), None


def _here(model_folder: Path, paths: Paths) -> tuple[Machine, EngineState]:
    from concurrent.futures import ThreadPoolExecutor

    # Other programs take their time to answer; meanwhile the machine is read.
    with ThreadPoolExecutor(1) as beside:
        others = beside.submit(find_other_engines)
        machine = detect_machine(model_folder)
        installation = inspect_installation()
        compiled = CompiledSets(None, reason="no engine is installed")
        layout: RepackPolicy | None = None
        if installation is not None:
            build = installation.build
            machine = add_engine_gpus(machine, build)
            entry = instructions_entry(paths.probes_dir, machine_fingerprint(machine), build)
            compiled = compiled_sets(build, entry)
            known = known_policy(layout_entry(paths, machine, build), build)
            layout = known.policy if known else None
        machine = recall_measurements(machine, paths)
        return machine, EngineState(installation, compiled, layout, others.result(), inherited())


def _model(ref: str, paths: Paths) -> tuple[str, ModelHeader, bool]:
    """(words, header, whether the file is here) of a shape's name with a quant, or of a local model."""
    name, _, quant = ref.partition(":")
    if name in SHAPES and not Path(ref).exists():
        quant = quant.upper() or _DEFAULT_QUANT
        return f"{_TITLES.get(name, name)} {quant}", imagined_header(name, quant), False
    model = locate_model(ref, paths)
    words = model.shape.name or model.header.paths[0].stem
    return f"{words} {model.shape.quant or ''}".strip(), model.header, True


def _model_folder(header: ModelHeader) -> Path:
    """Where the model lies, or where one that is not here would be downloaded to."""
    return header.paths[0].parent if header.paths else hub_folder(os.environ)


def _facts(engine: EngineState | None, machine: Machine) -> EngineFacts | None:
    if engine is None:
        return None
    found = engine.installation
    if found is None:
        return EngineFacts(
            pinned_version=f"{DISTRIBUTION} {PINNED_VERSION}", rebuild=_build_command(machine, None)
        )
    name = f"{found.build.name} {found.build.version}"
    return EngineFacts(
        build=f"{name} (a fork)" if found.fork else name,
        expected=found.pinned,
        pinned_version=f"{DISTRIBUTION} {PINNED_VERSION}",
        claimants=(found.build.name, *(rival.split()[0] for rival in found.rivals)),
        backends=found.build.backends,
        compiled_sets=engine.compiled.sets,
        dies_of_instruction=engine.compiled.illegal,
        safe_layout=engine.safe_layout,
        rebuild=_build_command(machine, found),
    )


def _build_command(machine: Machine, found: Installation | None) -> str:
    """The command that builds the engine for every GPU that is here, and what it needs first."""
    built = found.build.backends if found else ()
    kinds = [gpu.kind for gpu in machine.gpus if gpu.kind] + [kind for kind in GPU_KINDS if kind in built]
    if has_integrated_gpu(machine):
        kinds.append("vulkan")
    kinds = list(dict.fromkeys(kinds))
    missing = [need for kind in kinds or ["cpu"] for need in missing_prerequisites(kind)]
    command = rebuild_command(*kinds, installed=found is not None)
    return f"{command}  (first install {' and '.join(dict.fromkeys(missing))})" if missing else command


def _variables(engine: EngineState | None) -> tuple[Variable, ...]:
    """Those that change an engine. Where models are kept does not, nor do threads that the plan sets."""
    found = engine.variables if engine else ()
    return tuple(
        Variable(one.name, one.effect, one.reaches_engine and not one.name.startswith("OMP_NUM"))
        for one in found
        if not one.name.startswith(("HF_", "HUGGINGFACE_"))
    )


def _known_models(case: Case) -> tuple[KnownModel, ...]:
    cached = find_cached().models
    until = time.monotonic() + LOOK_AT_MODELS_S
    return tuple(_look_at(model, case, until) for model in cached)


def _is_it(cached: CachedModel, ref: str) -> bool:
    """Whether a file on this disk is what a shape's name with a quant stands for."""
    name, _, quant = ref.lower().partition(":")
    return cached.complete and name in (cached.repo or "").lower() and quant == (cached.quant or "").lower()


def _look_at(model: CachedModel, case: Case, until: float) -> KnownModel:
    if not model.complete:
        return KnownModel(model, reason="not all of it is here")
    if time.monotonic() > until:
        return KnownModel(model, reason="not looked at; see: qnext plan")
    try:
        header = read_header(model.path)
        there = replace(case, header=header, shape=read_shape(header))
        return KnownModel(model, there.fits, there.now.prediction if there.fits else None)
    except QnextError as error:
        return KnownModel(model, reason=error.message)


def _engine_to_dict(engine: EngineState) -> dict[str, Any]:
    found = engine.installation
    return {
        "installed": asdict(found) if found is not None else None,
        "compiled_sets": engine.compiled.sets,
        "compiled_sets_reason": engine.compiled.reason or None,
        "safe_layout": engine.safe_layout,
        "others": [asdict(other) for other in engine.others],
        "variables": [asdict(variable) for variable in engine.variables],
    }


def _model_to_dict(model: KnownModel) -> dict[str, Any]:
    from qnext.engine.build import show_path

    cached = model.cached
    return {
        "path": show_path(cached.path),
        "repo": cached.repo,
        "quant": cached.quant,
        "bytes": cached.size_bytes,
        "complete": cached.complete,
        "fits": model.fits,
        "prediction": asdict(model.prediction) if model.prediction else None,
        "reason": model.reason or None,
    }
