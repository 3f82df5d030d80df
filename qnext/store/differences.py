"""What differs between two records besides their speeds, told in knobs: what a person turns at once.

An upgrade of the engine changes version, commit and build together, and another model all its digests: each
is one knob. What follows from a knob is no second one: a rule for expert layers stands among the overrides as
well, and another machine has its own bandwidths and drivers. A fact that only one record knows is listed
apart: it can neither be called equal nor different.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import log
from typing import Any

from qnext.plan.expert_rules import expert_pattern
from qnext.store.record import Record

BANDWIDTH_NOISE = 0.10
"""Two measurements of one memory differ by a few per cent; a module that fell back differs by far more."""

MODEL, ENGINE, MACHINE, WORKLOAD = "model", "engine", "machine", "workload"
DEVICES, DRIVER, BANDWIDTH, POWER, ENVIRONMENT = "devices", "driver", "bandwidth", "power", "environment"

_OF_THE_MACHINE = frozenset({DEVICES, DRIVER, BANDWIDTH, POWER})
_PART_OF = {
    "threads_batch": "threads",
    "kv_type_k": "kv_type",
    "kv_type_v": "kv_type",
    "cpu_expert_layers": "experts",
    "devices": DEVICES,
}
"""Field of a placement -> its knob, where that has another name."""

_NOT_OF_THE_TESTS = frozenset({"tests", "repetitions"})
"""Keys of a workload that say how much was measured; tests are compared one by one."""


@dataclass(frozen=True, slots=True)
class Difference:
    """`field` (a dotted path) is `a` in the first record and `b` in the second; it belongs to `knob`."""

    knob: str
    field: str
    a: Any
    b: Any


@dataclass(frozen=True, slots=True)
class Differences:
    """`differing` is known to differ, `unknown` is told by one record alone. In the order of importance."""

    differing: tuple[Difference, ...]
    unknown: tuple[Difference, ...]

    @property
    def knobs(self) -> tuple[str, ...]:
        """Each knob that differs, once."""
        return tuple(dict.fromkeys(found.knob for found in self.differing))


def find_differences(a: Record, b: Record) -> Differences:
    """Everything in which the identities of two records differ. Tests and samples are no part of it."""
    found = list(_facts(a, b))
    if any(fact.knob == MACHINE and None not in (fact.a, fact.b) for fact in found):
        found = [
            Difference(MACHINE, fact.field, fact.a, fact.b) if fact.knob in _OF_THE_MACHINE else fact
            for fact in found
        ]
    return Differences(
        differing=tuple(fact for fact in found if fact.a is not None and fact.b is not None),
        unknown=tuple(fact for fact in found if fact.a is None or fact.b is None),
    )


def _facts(a: Record, b: Record) -> Iterator[Difference]:
    """Each fact that is not the same, with None for the side that does not tell it."""
    yield from _model(a, b)
    yield from _engine(a, b)
    yield from _machine(a, b)
    one, two = a.identity, b.identity
    yield from _unequal(DEVICES, "devices", one.devices, two.devices)
    yield from _unequal(DRIVER, "driver", one.driver, two.driver)
    for name, x, y in _keys(one.bandwidths, two.bandwidths):
        if not (x and y and abs(log(x / y)) <= log(1 + BANDWIDTH_NOISE)):
            yield from _unequal(BANDWIDTH, f"bandwidth.{name}", x, y)
    for name, x, y in _keys(one.power, two.power):
        yield from _unequal(POWER, f"power.{name}", x, y)
    yield from _environment(one.environment, two.environment)
    yield from _placement(a.placement, b.placement)
    if a.workload is not None and b.workload is not None:
        for name, x, y in _keys(a.workload, b.workload):
            if name not in _NOT_OF_THE_TESTS:
                yield from _unequal(WORKLOAD, f"workload.{name}", x, y)


def _model(a: Record, b: Record) -> Iterator[Difference]:
    one, two = a.identity, b.identity
    if one.model_digest == two.model_digest:
        return
    described = [(one.model_bytes, two.model_bytes), (one.model_params, two.model_params)]
    same = all(None in pair or pair[0] == pair[1] for pair in described)
    if same and _scheme(one.model_digest) != _scheme(two.model_digest):
        yield Difference(MODEL, "model_digest", one.model_digest, None)  # nothing speaks against one model
        return
    yield from _unequal(MODEL, "model_digest", one.model_digest, two.model_digest)
    for name in ("header_digest", "quant", "model_bytes", "model_params"):
        x, y = getattr(one, name), getattr(two, name)
        if x is not None and y is not None:
            yield from _unequal(MODEL, name, x, y)


def _engine(a: Record, b: Record) -> Iterator[Difference]:
    one, two = a.identity.engine, b.identity.engine
    yield from _unequal(ENGINE, "engine.name", one.name, two.name)
    if one.name == two.name:
        yield from _unequal(ENGINE, "engine.version", one.version, two.version)
        yield from _unequal(ENGINE, "engine.build", one.build, two.build)
    x, y = one.llama_commit, two.llama_commit
    if x is None or y is None or not (x.startswith(y) or y.startswith(x)):  # abbreviated to any length
        yield from _unequal(ENGINE, "engine.llama_commit", x, y)
    if one.flags is not None and two.flags is not None:
        yield from _unequal(ENGINE, "engine.flags", one.flags, two.flags)


def _machine(a: Record, b: Record) -> Iterator[Difference]:
    one, two = a.identity.machine, b.identity.machine
    if one == two:
        return
    words = [(name, _told(a, name), _told(b, name)) for name in ("cpu", "gpus")]
    if _scheme(one) != _scheme(two) and all(x == y for _, x, y in words):
        yield Difference(MACHINE, "machine", one, None)
        return
    yield from _unequal(MACHINE, "machine", one, two)
    for name, x, y in words:
        if x is not None and y is not None:
            yield from _unequal(MACHINE, name, x, y)


def _told(record: Record, name: str) -> str | None:
    """Processor or GPUs by name, from a machine of ours or from llama-bench's words."""
    told = record.machine.get("llama_bench")
    if isinstance(told, Mapping):
        value = told.get({"cpu": "cpu_info", "gpus": "gpu_info"}[name])
        return None if value is None else str(value)
    part = record.machine.get({"cpu": "cpu", "gpus": "gpus"}[name])
    if isinstance(part, Mapping):
        return part.get("model")
    return ", ".join(str(gpu.get("name")) for gpu in part) if isinstance(part, list) else None


def _environment(
    a: Mapping[str, str | None] | None, b: Mapping[str, str | None] | None
) -> Iterator[Difference]:
    if a is None or b is None:
        return  # records of qnext 0.1 name what was set in a warning
    for name in dict.fromkeys((*a, *b)):
        x, y = ((side[name] or "set") if name in side else "not set" for side in (a, b))
        yield from _unequal(ENVIRONMENT, f"environment.{name}", x, y)


def _placement(a: Mapping[str, object], b: Mapping[str, object]) -> Iterator[Difference]:
    for name, x, y in _keys(_plain(a), _plain(b)):
        yield from _unequal(_PART_OF.get(name, name), name, x, y)


def _plain(placement: Mapping[str, Any]) -> dict[str, Any]:
    """The placement without the override that says only what `cpu_expert_layers` says, and None in words."""
    layers = tuple(placement.get("cpu_expert_layers") or ())
    rule = expert_pattern(layers) if layers else None
    plain: dict[str, Any] = {
        name: "none" if value is None else _lists(value) for name, value in placement.items()
    }
    if isinstance(plain.get("overrides"), list):
        plain["overrides"] = [
            f"{entry['pattern']}={entry['buffer']}"
            for entry in plain["overrides"]
            if entry["pattern"] != rule
        ]
    return plain


def _keys(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> Iterator[tuple[str, Any, Any]]:
    """(key, value in a, value in b) for every key of either; nothing where one side has no such mapping."""
    if a is not None and b is not None:
        for name in dict.fromkeys((*a, *b)):
            yield name, _lists(a.get(name)), _lists(b.get(name))


def _unequal(knob: str, field: str, x: Any, y: Any) -> Iterator[Difference]:
    if _lists(x) != _lists(y):
        yield Difference(knob, field, _lists(x), _lists(y))


def _lists(value: Any) -> Any:
    """Tuples as the lists that they are in JSON."""
    return [_lists(entry) for entry in value] if isinstance(value, list | tuple) else value


def _scheme(digest: str) -> str:
    """What a digest was made of, by its prefix."""
    return digest.rpartition(":")[0]
