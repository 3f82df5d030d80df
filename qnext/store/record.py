"""One run or benchmark as it is kept: what was planned, what was allocated, what was measured.

Prediction and measurement lie in the same record under the same keys, so that a forecast can be judged later
and by someone else. All raw samples are kept; medians are there for convenience and can be made again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeVar, cast, get_args

from qnext.errors import StoreError
from qnext.plan.values import DeviceMemory, SpeedRange, device_to_dict

T = TypeVar("T")

SCHEMA = "qnext.record/1"

Status = Literal["ok", "failed", "running", "interrupted"]
Kind = Literal["run", "bench", "sweep", "import"]
"""`sweep`: a configuration that was tried and was neither baseline nor winner (those are `bench`). `import`:
read from a file that llama-bench or another qnext wrote."""


@dataclass(frozen=True, slots=True)
class TestResult:
    """One test in llama-bench's sense: `name` is `pp512` or `tg128 @ d4096`.

    `samples_ns` is the time of each counted repetition; `low_tps` and `high_tps` are the slowest and the
    fastest of them. `bandwidth_share` is the part of the memory-bandwidth ceiling that was reached.

    Imported tests may lack their samples. Then `mean_ns` and `stddev_ns` are what the file told instead, the
    median is its mean speed, and low and high lie one standard deviation beside it.
    """

    __test__: ClassVar[bool] = False  # the name is llama-bench's; keeps pytest from collecting it

    name: str
    prompt: int
    generate: int
    depth: int
    samples_ns: tuple[int, ...]
    median_tps: float
    low_tps: float
    high_tps: float
    predicted_tps: SpeedRange | None = None
    bandwidth_share: float | None = None
    mean_ns: int | None = None
    stddev_ns: int | None = None


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """`name` of the distribution, its `version`, its llama.cpp's commit, `build`: a digest and the backends.

    `flags` is llama.cpp's own line of what it was compiled with (`llama_print_system_info`).
    """

    name: str
    version: str
    llama_commit: str | None
    build: str
    flags: str | None = None


@dataclass(frozen=True, slots=True)
class Identity:
    """Everything that must be equal for two speeds to be comparable.

    `machine` is the machine's fingerprint; `placement` and `workload` are digests of their JSON forms. The
    fields from `header_digest` on are None in records of qnext 0.1 and where the fact is not known.

    `model_type`, `model_bytes` and `model_params` are llama-bench's words for a model: its description, the
    bytes and the number of its weights. `devices` are the offload devices in order, by engine name and card
    (`CUDA0 NVIDIA GeForce RTX 4090`), empty for the CPU alone; `driver` is theirs. `context` is the total
    over `slots`. `bandwidths` are measured rates in bytes per second by name (`ram`, `CUDA0 h2d`), `power`
    is what governs clocks (`governor`, `profile`, `on_battery`, `CUDA0 limit_w`), `environment` holds the
    variables that reach the engine, with None for a value that was not kept.
    """

    model_digest: str
    quant: str | None
    engine: EngineIdentity
    machine: str
    placement: str
    workload: str
    header_digest: str | None = None
    model_type: str | None = None
    model_bytes: int | None = None
    model_params: int | None = None
    devices: tuple[str, ...] | None = None
    driver: str | None = None
    context: int | None = None
    slots: int | None = None
    kv_type_k: str | None = None
    kv_type_v: str | None = None
    bandwidths: Mapping[str, int] | None = None
    power: Mapping[str, str | int | bool] | None = None
    environment: Mapping[str, str | None] | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """`when` is the start, ISO-8601 in UTC. `placement`, `machine` and `workload` are JSON forms (str keys).

    `text` is what was generated, if that was kept; `error` is why a failed record failed.
    """

    id: str
    when: str
    status: Status
    kind: Kind
    model_ref: str
    identity: Identity
    planned: tuple[DeviceMemory, ...] = ()
    allocated: tuple[DeviceMemory, ...] = ()
    tests: tuple[TestResult, ...] = ()
    text: str | None = None
    warnings: tuple[str, ...] = ()
    placement: Mapping[str, object] = field(default_factory=dict)
    machine: Mapping[str, object] = field(default_factory=dict)
    error: str | None = None
    command: tuple[str, ...] = ()
    workload: Mapping[str, object] | None = None


def record_to_dict(record: Record) -> dict[str, Any]:
    """The record as JSON values, schema `qnext.record/1`.

    Keys: schema, id, status, when, identity (as `Identity`, engine inside), planned {devices}, allocated
    {devices}, tests, text, warnings; a device has the keys that it has in a plan. Besides these: kind, model
    (its reference as given), placement, machine and workload (what the digests in identity stand for), error,
    command (the arguments that made the record).
    """
    return {
        "schema": SCHEMA,
        "id": record.id,
        "status": record.status,
        "when": record.when,
        "kind": record.kind,
        "model": record.model_ref,
        "identity": identity_to_dict(record.identity),
        "planned": {"devices": [device_to_dict(device) for device in record.planned]},
        "allocated": {"devices": [device_to_dict(device) for device in record.allocated]},
        "tests": [test_to_dict(test) for test in record.tests],
        "text": record.text,
        "warnings": list(record.warnings),
        "placement": dict(record.placement),
        "machine": dict(record.machine),
        "error": record.error,
        "command": list(record.command),
        "workload": None if record.workload is None else dict(record.workload),
    }


def record_from_dict(data: Mapping[str, Any]) -> Record:
    """Inverse of `record_to_dict`. Unknown keys are ignored; a missing or wrong one raises StoreError."""
    schema = data.get("schema")
    if schema != SCHEMA:
        raise StoreError(
            f"'{schema}' is not a record this qnext can read (it reads {SCHEMA})",
            hint="Give a record written by `qnext bench show ID --json`, or upgrade qnext.",
        )
    try:
        return Record(
            id=_text(data["id"]),
            when=_text(data["when"]),
            status=cast(Status, _one_of(data["status"], get_args(Status))),
            kind=cast(Kind, _one_of(data["kind"], get_args(Kind))),
            model_ref=_text(data["model"]),
            identity=identity_from_dict(data["identity"]),
            planned=tuple(device_from_dict(device) for device in data["planned"]["devices"]),
            allocated=tuple(device_from_dict(device) for device in data["allocated"]["devices"]),
            tests=tuple(test_from_dict(test) for test in data["tests"]),
            text=_text_or_none(data["text"]),
            warnings=tuple(_text(warning) for warning in data["warnings"]),
            placement=dict(data["placement"]),
            machine=dict(data["machine"]),
            error=_text_or_none(data["error"]),
            command=tuple(_text(word) for word in data["command"]),
            workload=_mapping_or_none(data.get("workload")),
        )
    except KeyError as error:
        raise _damaged(f"key {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise _damaged(str(error)) from error


def device_from_dict(data: Mapping[str, Any]) -> DeviceMemory:
    """Inverse of `device_to_dict`; raises KeyError, TypeError or ValueError on a wrong mapping."""
    budget = data["budget_bytes"]
    return DeviceMemory(
        name=_text(data["name"]),
        kind=cast(Literal["host", "gpu", "rpc"], _one_of(data["kind"], ("host", "gpu", "rpc"))),
        budget_bytes=None if budget is None else int(budget),
        weights_bytes=int(data["weights_bytes"]),
        kv_bytes=int(data["kv_bytes"]),
        recurrent_bytes=int(data["recurrent_bytes"]),
        compute_bytes=int(data["compute_bytes"]),
        other_bytes=int(data["other_bytes"]),
    )


def test_to_dict(test: TestResult) -> dict[str, Any]:
    """One entry of `tests`."""
    predicted = test.predicted_tps
    return {
        "name": test.name,
        "prompt": test.prompt,
        "generate": test.generate,
        "depth": test.depth,
        "samples_ns": list(test.samples_ns),
        "median_tps": test.median_tps,
        "low_tps": test.low_tps,
        "high_tps": test.high_tps,
        "predicted_tps": predicted and {"low": predicted.low, "mid": predicted.mid, "high": predicted.high},
        "bandwidth_share": test.bandwidth_share,
        "mean_ns": test.mean_ns,
        "stddev_ns": test.stddev_ns,
    }


def test_from_dict(data: Mapping[str, Any]) -> TestResult:
    """Inverse of `test_to_dict`; raises KeyError, TypeError or ValueError on a wrong mapping."""
    predicted, share = data["predicted_tps"], data["bandwidth_share"]
    return TestResult(
        name=_text(data["name"]),
        prompt=int(data["prompt"]),
        generate=int(data["generate"]),
        depth=int(data["depth"]),
        samples_ns=tuple(int(sample) for sample in data["samples_ns"]),
        median_tps=float(data["median_tps"]),
        low_tps=float(data["low_tps"]),
        high_tps=float(data["high_tps"]),
        predicted_tps=predicted
        and SpeedRange(
            low=float(predicted["low"]), mid=float(predicted["mid"]), high=float(predicted["high"])
        ),
        bandwidth_share=None if share is None else float(share),
        mean_ns=_int_or_none(data.get("mean_ns")),
        stddev_ns=_int_or_none(data.get("stddev_ns")),
    )


def identity_to_dict(identity: Identity) -> dict[str, Any]:
    """The identity as JSON values, a key per field."""
    plain: dict[str, Any] = {entry.name: getattr(identity, entry.name) for entry in fields(Identity)}
    plain["engine"] = {entry.name: getattr(identity.engine, entry.name) for entry in fields(EngineIdentity)}
    plain["devices"] = None if identity.devices is None else list(identity.devices)
    for name in ("bandwidths", "power", "environment"):
        plain[name] = None if plain[name] is None else dict(plain[name])
    return plain


def identity_from_dict(data: Mapping[str, Any]) -> Identity:
    """Inverse of `identity_to_dict`; a key that qnext 0.1 did not write may be missing.

    Raises KeyError, TypeError or ValueError on a wrong mapping.
    """
    engine, devices = data["engine"], data.get("devices")
    return Identity(
        model_digest=_text(data["model_digest"]),
        quant=_text_or_none(data["quant"]),
        engine=EngineIdentity(
            name=_text(engine["name"]),
            version=_text(engine["version"]),
            llama_commit=_text_or_none(engine["llama_commit"]),
            build=_text(engine["build"]),
            flags=_text_or_none(engine.get("flags")),
        ),
        machine=_text(data["machine"]),
        placement=_text(data["placement"]),
        workload=_text(data["workload"]),
        header_digest=_text_or_none(data.get("header_digest")),
        model_type=_text_or_none(data.get("model_type")),
        model_bytes=_int_or_none(data.get("model_bytes")),
        model_params=_int_or_none(data.get("model_params")),
        devices=None if devices is None else tuple(_text(device) for device in devices),
        driver=_text_or_none(data.get("driver")),
        context=_int_or_none(data.get("context")),
        slots=_int_or_none(data.get("slots")),
        kv_type_k=_text_or_none(data.get("kv_type_k")),
        kv_type_v=_text_or_none(data.get("kv_type_v")),
        bandwidths=_mapping_of(_whole, data.get("bandwidths")),
        power=_mapping_of(_scalar, data.get("power")),
        environment=_mapping_of(_text_or_none, data.get("environment")),
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _text_or_none(value: object) -> str | None:
    return None if value is None else _text(value)


def _int_or_none(value: Any) -> int | None:
    return None if value is None else int(value)


def _mapping_or_none(value: Any) -> dict[str, Any] | None:
    return None if value is None else dict(value)


def _mapping_of(read: Callable[[Any], T], value: Any) -> dict[str, T] | None:
    return None if value is None else {_text(name): read(entry) for name, entry in dict(value).items()}


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no whole number")
    return value


def _scalar(value: Any) -> str | int | bool:
    if not isinstance(value, str | int):
        raise TypeError(f"{value!r} is neither text nor a whole number")
    return value


def _one_of(value: object, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{value!r} is none of {', '.join(allowed)}")
    return cast(str, value)


def _damaged(why: str) -> StoreError:
    return StoreError(
        f"a record cannot be read: {why}", hint="It was changed by another program; restore it from a copy."
    )
