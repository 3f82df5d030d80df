"""What sweeps found, kept as one YAML file per model and machine, and taken by `qnext run` and `bench run`.

A tuned profile holds a placement that was measured. It replaces the planner's choices, not the user's: what
a flag names stays as the flag says, and a flag that places weights makes the profile step aside. Memory is
planned as ever, so a profile that has no room today gives way to the plan. It is of one build of the engine,
one driver and one amount of memory; when one of these has changed it is stale, which is said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qnext.config import Paths
from qnext.engine.build import EngineBuild
from qnext.engine.cache import write_atomically
from qnext.engine.dry_run import DryRunner
from qnext.errors import EngineError, UsageError
from qnext.hardware import Machine, machine_fingerprint
from qnext.pipeline.locate import OnHeaders
from qnext.pipeline.planning import (
    ChosenModel,
    PlannedModel,
    choose_quant_here,
    compute_per_device,
    plan_chosen,
    problem_on,
    with_path,
)
from qnext.pipeline.request import Request
from qnext.pipeline.surroundings import Notice
from qnext.pipeline.sweep_values import placement_from_dict, problem_of
from qnext.plan.choice import Cache, named_cache
from qnext.plan.plan import make_plan
from qnext.plan.values import Placement
from qnext.store.identity import model_digest
from qnext.store.sweeps import SweepStore

SCHEMA = "qnext.tuned/1"
LIKELY_FASTER = "likely faster"
"""The word of a winner that was chosen by all that was measured, where no test shows it to be faster."""
_FOLDER = "tuned"
_SAME_MEMORY = 0.03
"""How far the amount of RAM may move: kernels and firmware keep other parts for themselves."""


@dataclass(frozen=True, slots=True)
class TunedProfile:
    """A placement and what it was measured to be worth.

    `turn_s` is the objective's time of `workload`; `ratio` its share of the plan's, with the interval, and
    `verdict` the test's word on it. `memory_bytes` are the RAM and each GPU's memory.
    """

    name: str
    model: str
    model_digest: str
    machine: str
    cpu: str | None
    engine: str
    driver: str | None
    memory_bytes: tuple[int, ...]
    when: str
    sweep: str
    objective: str
    workload: Mapping[str, int]
    turn_s: float
    ratio: tuple[float, float, float] | None
    verdict: str
    placement: Placement
    environment: Mapping[str, str] = field(default_factory=dict)


def profile_name(model_ref: str, digest: str, machine: str) -> str:
    """A file name that a person recognises and that belongs to one model on one machine."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model_ref).name.removesuffix(".gguf")).strip("-.") or "model"
    return f"{stem[:60]}-{digest.rpartition(':')[2][:8]}-{machine.rpartition(':')[2][:8]}"


def memory_of(machine: Machine) -> tuple[int, ...]:
    """Bytes of RAM and of each GPU, 0 where not known."""
    return (machine.memory.total_bytes or 0, *(gpu.vram_total_bytes or 0 for gpu in machine.gpus))


def driver_of(machine: Machine) -> str | None:
    """The driver of the first GPU that tells one."""
    return next((gpu.driver for gpu in machine.gpus if gpu.driver), None)


def save_profile(profile: TunedProfile, paths: Paths) -> Path:
    """Write the profile; the one before of the same name is replaced."""
    import yaml

    data = {"schema": SCHEMA, **asdict(profile)}
    for name in ("memory_bytes", "ratio"):
        data[name] = None if data[name] is None else list(data[name])
    data["placement"] = _plain(data["placement"])
    path = paths.config_dir / _FOLDER / f"{profile.name}.yaml"
    write_atomically(path, yaml.safe_dump(data, sort_keys=False, allow_unicode=True))
    return path


def load_profiles(paths: Paths) -> list[TunedProfile]:
    """Every tuned profile of the user, the newest first. Raises UsageError for a file that is none."""
    folder = paths.config_dir / _FOLDER
    found = [_read(path) for path in sorted(folder.glob("*.yaml"))]
    return sorted(found, key=lambda profile: profile.when, reverse=True)


def tuned_records(paths: Paths) -> dict[str, str]:
    """Ids of the winners' records by the names of the tuned profiles, the newest first."""
    store, found = SweepStore(paths.results_db), {}
    for profile in load_profiles(paths):
        try:
            sweep = store.get(profile.sweep)
        except UsageError:  # the results were moved away, the profile was not
            continue
        winner = (sweep.result or {}).get("winner")
        record = next((cell.record_id for cell in sweep.cells if cell.name == winner), None)
        if record is not None:
            found[profile.name] = record
    return found


def what_changed(profile: TunedProfile, machine: Machine, build: EngineBuild) -> list[str]:
    """Why a profile says nothing any more; empty while it is good."""
    changed = []
    if profile.engine != build.digest:
        changed.append("the engine")
    if profile.driver != driver_of(machine):
        changed.append("the GPU driver")
    then, now = profile.memory_bytes, memory_of(machine)
    if len(then) != len(now) or any(
        abs(a - b) > _SAME_MEMORY * max(a, b) for a, b in zip(then, now, strict=False)
    ):
        changed.append("the memory")
    elif profile.machine != machine_fingerprint(machine):
        changed.append("the machine")
    return changed


def plan_tuned(
    request: Request, paths: Paths, notice: Notice, on_headers: OnHeaders | None = None
) -> PlannedModel:
    """The tuned placement of the model where there is one that is good and has room; else as `plan_model`."""
    chosen = choose_quant_here(request, paths, notice, on_headers)
    found = _tuned_plan(request, paths, notice, chosen)
    return plan_chosen(request, paths, chosen) if found is None else found


def _tuned_plan(request: Request, paths: Paths, notice: Notice, chosen: ChosenModel) -> PlannedModel | None:
    around = chosen.surroundings
    profiles = load_profiles(paths)
    if not profiles or around.build is None or not around.this_machine:
        return None
    digest, machine = model_digest(chosen.model.header.paths), around.machine
    ours = [
        profile for profile in profiles if profile.model_digest == digest and profile.cpu == machine.cpu.model
    ]
    good = next((profile for profile in ours if not what_changed(profile, machine, around.build)), None)
    if good is None:
        if ours:
            changed = " and ".join(what_changed(ours[0], machine, around.build))
            notice(
                f"the tuned profile of {ours[0].when[:10]} is stale: {changed} changed; "
                f"measure again: qnext bench sweep {request.model}"
            )
        return None
    asked = _weights_asked(request, good.placement)
    if asked:
        notice(f"tuned profile {good.name} is not used, because of {', '.join(asked)}")
        return None
    placement = _with_wishes(good.placement, request, named_cache(request, chosen.model.shape))
    problem = problem_of(problem_on(machine, chosen.model, request, around), placement)
    if set(placement.devices) - set(problem.offload_devices()):
        notice(f"tuned profile {good.name} is not used: it needs {', '.join(placement.devices)}")
        return None
    try:
        with closing(DryRunner(chosen.model.header, around.build, paths.headers_dir)) as runner:
            compute = compute_per_device(runner.measure(placement), problem.used(placement))
        problem = replace(problem, compute=compute)
    except EngineError as error:
        notice(f"no dry run of the tuned profile: {error.message}")
    plan = make_plan(chosen.model.ref, problem, around.speeds, placement=placement)
    if not plan.fits:
        notice(f"tuned profile {good.name} has no room now; planning anew")
        return None
    plan = with_path(replace(plan, warnings=(*around.warnings, *plan.warnings)), chosen.model)
    notice(_said(good))
    return PlannedModel(
        chosen.model, around, problem, plan, chosen.candidates, environment=dict(good.environment)
    )


def _said(profile: TunedProfile) -> str:
    worth = "no faster than the plan"
    if profile.verdict == "faster" and profile.ratio is not None:
        worth = f"{1 - profile.ratio[0]:.0%} less time than the plan"
    elif profile.verdict == LIKELY_FASTER:
        worth = "likely faster than the plan, no test shows it"
    return f"tuned profile of {profile.when[:10]} in use ({worth}); --no-tuned plans without it"


def _weights_asked(request: Request, tuned: Placement) -> list[str]:
    """Flags that place weights or sequences otherwise than the planner would be free to."""
    given = {
        "-ngl": request.n_gpu_layers is not None,
        "-ncmoe": request.cpu_experts is not None,
        "-ot": bool(request.overrides),
        "-ts": request.tensor_split is not None,
        "--repack": request.repack is not None,
        "--load-mode": request.load_mode != "none",
        "-np": request.parallel not in (None, 1),
        "--rpc": request.rpc_servers != tuned.rpc_servers,
    }
    return [flag for flag, is_given in given.items() if is_given]


def _with_wishes(tuned: Placement, request: Request, cache: Cache | None) -> Placement:
    """The tuned placement with what the user named."""
    named: dict[str, Any] = {
        "context": request.context,
        "threads": request.threads,
        "threads_batch": request.threads_batch or request.threads,
        "ubatch": request.ubatch,
        "batch": request.batch if request.batch != 2048 else None,
        "flash_attention": request.flash_attention if request.flash_attention != "on" else None,
    }
    if cache is not None:
        named |= {"kv_type_k": cache[0], "kv_type_v": cache[1]}
    return replace(tuned, **{name: value for name, value in named.items() if value is not None})


def _read(path: Path) -> TunedProfile:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        if data.pop("schema") != SCHEMA:
            raise ValueError(f"it is no {SCHEMA}")
        data["placement"] = placement_from_dict(data["placement"])
        data["memory_bytes"] = tuple(data["memory_bytes"])
        data["ratio"] = None if data["ratio"] is None else tuple(data["ratio"])
        return TunedProfile(**data)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise UsageError(
            f"{path} is no tuned profile: {' '.join(str(error).split())}",
            hint="Delete it and measure again with qnext bench sweep, or give --no-tuned.",
        ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
