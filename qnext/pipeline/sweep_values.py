"""The values of a sweep, and their JSON: what to try (`Cell`), how it was asked for (`SweepSettings`).

A sweep is resumed from its stored cells and settings, never from a new plan: a forecast that changed
meanwhile would send the search another way than the measurements that it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from qnext.bench.knob_model import Level
from qnext.bench.race_values import Arm
from qnext.pipeline.request import Request
from qnext.plan.placement import Problem
from qnext.plan.values import MODEL_FIELDS, Override, Placement, Prediction, SpeedRange, Workload
from qnext.store.identity import digest_of

Objective = Literal["turn", "decode", "prefill"]
Role = Literal["plan", "fit", "defaults"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One configuration. `environment` is added to the engine's; `predicted_s` is the objective's time.

    `roles` are the baselines that it is. `status` and `because` say why it is never run; empty where it may.
    `host_bytes` is what it takes of the RAM.
    """

    name: str
    placement: Placement
    knobs: Mapping[str, Level]
    demands: Mapping[str, float]
    order: int
    predicted_s: tuple[float, float, float]
    prediction: Prediction
    environment: Mapping[str, str] = field(default_factory=dict)
    roles: tuple[Role, ...] = ()
    status: str = ""
    because: str = ""
    host_bytes: int = 0

    @property
    def group(self) -> str:
        """The same for cells that run on one loaded model."""
        chosen = asdict(self.placement)
        return digest_of({**{name: chosen[name] for name in MODEL_FIELDS}, "environment": self.environment})

    def arm(self) -> Arm:
        """What the race knows of the cell."""
        return Arm(
            name=self.name,
            group=self.group,
            order=self.order,
            knobs=self.knobs,
            predicted_s=self.predicted_s,
            demands=self.demands,
            baseline=bool(self.roles),
            host_bytes=self.host_bytes,
        )


@dataclass(frozen=True, slots=True)
class Grid:
    """Levels that the user named for a knob; None leaves them to qnext. `cpu_experts` is `--n-cpu-moe`.

    `affinity` says where threads may run: `free`, or each on a core of its own (`cores`).
    """

    threads: tuple[int, ...] | None = None
    threads_batch: tuple[int, ...] | None = None
    batch: tuple[int, ...] | None = None
    ubatch: tuple[int, ...] | None = None
    kv_type_k: tuple[str, ...] | None = None
    kv_type_v: tuple[str, ...] | None = None
    flash_attention: tuple[str, ...] | None = None
    load_mode: tuple[str, ...] | None = None
    repack: tuple[str, ...] | None = None
    cpu_experts: tuple[int, ...] | None = None
    affinity: tuple[str, ...] | None = None

    @property
    def closed(self) -> bool:
        """Whether some knob has several levels: then the knobs that are not named stay as planned."""
        return any(len(getattr(self, entry.name) or ()) > 1 for entry in fields(self))


@dataclass(frozen=True, slots=True)
class RungSize:
    """Tokens of one measurement: `depth` come before, `prompt` are timed together, `generate` one by one."""

    prompt: int
    generate: int
    depth: int


@dataclass(frozen=True, slots=True)
class SweepSettings:
    """All that decides how a sweep goes, beside its cells. Times in seconds.

    `short` and `full` are the sizes of the two rungs; a cell with a larger ubatch than `short.prompt` takes
    a prompt of one ubatch. `max_loads`, `cover` and `room` (bytes) as the race has them.
    """

    request: Request
    objective: Objective
    seconds: float
    cells: int | None
    max_loads: int
    short: RungSize
    full: RungSize
    cooldown_s: float = 0.0
    seed: int = 0
    confidence: float = 0.95
    cover: bool = False
    room: int = 0

    @property
    def workload(self) -> Workload:
        """The turn whose time is to be small."""
        return self.request.workload


def settings_to_dict(settings: SweepSettings) -> dict[str, Any]:
    """As JSON values."""
    return asdict(settings)


def settings_from_dict(data: Mapping[str, Any]) -> SweepSettings:
    """Inverse of `settings_to_dict`."""
    request = _with_tuples(data["request"])
    request["workload"] = Workload(**request["workload"])
    request["overrides"] = tuple(Override(**rule) for rule in request["overrides"])
    return SweepSettings(
        **{
            **data,
            "request": Request(**request),
            "short": RungSize(**data["short"]),
            "full": RungSize(**data["full"]),
        }
    )


def cell_to_dict(cell: Cell) -> dict[str, Any]:
    """As JSON values, without name, status and reason, which the store keeps beside it."""
    kept = asdict(cell)
    for name in ("name", "status", "because"):
        del kept[name]
    return kept


def cell_from_dict(name: str, data: Mapping[str, Any], status: str = "", because: str = "") -> Cell:
    """Inverse of `cell_to_dict`."""
    told, prediction = dict(data), data["prediction"]
    told["placement"] = placement_from_dict(data["placement"])
    told["prediction"] = Prediction(
        decode_tps=prediction["decode_tps"] and SpeedRange(**prediction["decode_tps"]),
        prefill_tps=prediction["prefill_tps"] and SpeedRange(**prediction["prefill_tps"]),
        source=prediction["source"],
    )
    told["roles"], told["predicted_s"] = tuple(data["roles"]), tuple(data["predicted_s"])
    return Cell(name=name, status=status, because=because, **told)


def placement_from_dict(data: Mapping[str, Any]) -> Placement:
    """A placement from its JSON form."""
    values = _with_tuples(data)
    values["overrides"] = tuple(Override(**rule) for rule in values["overrides"])
    return Placement(**values)


def objective_seconds(objective: Objective, workload: Workload, prefill_s: float, decode_s: float) -> float:
    """Time of the objective: `prefill_s` and `decode_s` are those of one token."""
    prefill = 0.0 if objective == "decode" else workload.prompt * prefill_s
    decode = 0.0 if objective == "prefill" else workload.generate * decode_s
    return prefill + decode


def predicted_seconds(
    prediction: Prediction, objective: Objective, workload: Workload
) -> tuple[float, float, float]:
    """The objective's time as (low, mid, high); wide open where there is no forecast."""
    prefill, decode = prediction.prefill_tps, prediction.decode_tps
    if prefill is None or decode is None or not prefill.low or not decode.low:
        return (0.1, 1.0, 10.0)
    low, mid, high = (
        objective_seconds(objective, workload, 1 / getattr(prefill, end), 1 / getattr(decode, end))
        for end in ("high", "mid", "low")
    )
    return low, mid, high


def problem_of(problem: Problem, placement: Placement) -> Problem:
    """`problem` as wished for `placement`: what is said of it then speaks of the same cache and attention."""
    options = replace(
        problem.options,
        flash_attention=placement.flash_attention,
        kv_type_k=placement.kv_type_k,
        kv_type_v=placement.kv_type_v,
        ubatch=placement.ubatch,
    )
    return replace(problem, options=options)


def _with_tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
