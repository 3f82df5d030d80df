"""Measured speeds kept beside their forecasts, so that later ones on this machine and engine start from them.

A test teaches when what it measured is what a forecast means. The weights must be read from memory: a model
under 1 GiB, or under eight times the processor's last cache, is partly read from caches (the demo runs three
times as fast as memory allows). Threads must be as many as cores, or half of them at least, else the cores
are measured and not the memory; other machines (RPC), several sequences, a battery and variables that change
the engine are other conditions. Short tests and those whose samples drift or scatter are noise; one
sample, as of an answer in `qnext run`, cannot show whether something disturbed it, and counts for less.

Kept are the terms of the forecast, not its result: what is learnt stays right when the constants are fitted
anew, and when the RAM's bandwidth is measured again.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qnext.config import Paths
from qnext.engine.build import EngineBuild
from qnext.engine.cache import write_atomically
from qnext.hardware import Machine, machine_fingerprint
from qnext.plan.kernels import DECODE_SPREAD, FITTED, PREFILL_SPREAD
from qnext.plan.speed import Load, MachineSpeeds, active_work, decode_terms, prefill_terms, several_gpus
from qnext.plan.speed_history import NOTHING_LEARNT, SpeedHistory, SpeedTest, learn, model_key, parts_ns
from qnext.plan.turn import place_tensors
from qnext.plan.values import Workload
from qnext.store.identity import digest_of, utc_now
from qnext.units import GIB

if TYPE_CHECKING:
    from qnext.pipeline.planning import PlannedModel
    from qnext.store.record import Record, TestResult

KEPT, KEPT_OF_MODEL = 32, 8
"""Newest tests of decode, and of prefill, that are remembered; of them of one model file."""
LEAST_BYTES = GIB
LEAST_CACHES = 8
LEAST_DECODED, LEAST_READ = 64, 256
"""Tokens that a test has to time in all: a tenth of a second and more even where they are fast."""
STEADY_SAMPLES, DOUBT = 3, 3.0
"""With fewer samples than these a test may lie so many times further off."""
_SLICE = "slice "
FARTHEST = 10.0
"""A speed so many times over or under its forecast is of something else."""


def recall_speeds(machine: Machine, build: EngineBuild, paths: Paths, speeds: MachineSpeeds) -> SpeedHistory:
    """What the tests remembered of this machine and engine build teach; nothing if they cannot be read."""
    tests: dict[str, list[SpeedTest]] = {"decode": [], "prefill": []}
    for entry in _read(_entry(machine, build, paths)):
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
            tests[entry["kind"]].append(_speed_test(entry, speeds.ram_bps))
    return SpeedHistory(
        learn(tests["decode"], DECODE_SPREAD) if tests["decode"] else None,
        learn(tests["prefill"], PREFILL_SPREAD) if tests["prefill"] else None,
    )


def remember_speeds(record: Record, planned: PlannedModel, build: EngineBuild, paths: Paths) -> None:
    """Keep the tests of a finished record that can teach; a test measured before gives way to its repetition.

    Not being able to write costs only what would have been learnt.
    """
    _keep(_teaching(record, planned), planned, build, paths)


def remember_slices(
    speeds: Mapping[Workload, float], planned: PlannedModel, build: EngineBuild, paths: Paths
) -> None:
    """Keep what slices say of the model that was planned, as if it had been measured: tokens per second of
    workloads that are either a prompt or an answer.
    """
    problem, placement = planned.problem, planned.plan.placement
    if any(device.kind == "rpc" for device in planned.plan.devices):
        return
    load = active_work(problem.shape, *place_tensors(problem, placement))
    common = _common(planned, load, digest_of(asdict(placement)), utc_now())
    found = []
    for workload, tps in speeds.items():
        kind, terms = _terms(workload, planned, load)
        name = f"pp{workload.prompt}" if workload.prompt else f"tg @ d{workload.depth}"
        measured = {"tps": tps, "samples": STEADY_SAMPLES}
        found.append({**common, "test": _SLICE + name, "kind": kind, "terms": terms, **measured})
    _keep(found, planned, build, paths)


def _keep(found: list[dict[str, Any]], planned: PlannedModel, build: EngineBuild, paths: Paths) -> None:
    if not found:
        return
    path = _entry(planned.surroundings.machine, build, paths)
    again = {_what(entry) for entry in found}
    entries = [entry for entry in _read(path) if _what(entry) not in again] + found
    write_atomically(path, json.dumps({"tests": _newest(entries)}))


def _newest(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that are kept, in their order: a long conversation must not drive out all other models."""
    counts: Counter[tuple[str, ...]] = Counter()
    kept = []
    for entry in reversed(entries):
        kind, model = str(entry.get("kind")), str(entry.get("model"))
        if counts[kind,] < KEPT and counts[kind, model] < KEPT_OF_MODEL:
            counts.update([(kind,), (kind, model)])
            kept.append(entry)
    return kept[::-1]


def _entry(machine: Machine, build: EngineBuild, paths: Paths) -> Path:
    return paths.probes_dir / f"speeds-{machine_fingerprint(machine)}-{build.digest}.json"


def _read(path: Path) -> list[dict[str, Any]]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and isinstance(content.get("tests"), list):
            return [entry for entry in content["tests"] if isinstance(entry, dict)]
    return []


def _what(entry: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(entry.get(key)) for key in ("model", "placement", "test"))


def _speed_test(entry: Mapping[str, Any], ram_bps: int | None) -> SpeedTest:
    """A remembered test beside its forecast by the constants and the RAM of today.

    Raises ValueError, TypeError, KeyError, AttributeError or ArithmeticError for what no test can be.
    """
    terms = {str(term): float(amount) for term, amount in entry["terms"].items()}
    if entry["ram_bps"] and ram_bps:
        now = float(entry["ram_bps"]) / ram_bps
        terms = {term: ns * (now if term.startswith("cpu_read_") else 1.0) for term, ns in terms.items()}
    if not terms.keys() <= FITTED.keys() or not all(0 < ns < math.inf for ns in terms.values()):
        raise ValueError("not the terms of a forecast")
    parts = parts_ns(terms, FITTED, entry["several_gpus"] is True)
    longer = math.log(1e9 / float(entry["tps"]) / sum(parts.values()))
    if not abs(longer) <= math.log(FARTHEST):
        raise ValueError("not a speed of what was forecast")
    doubt = 1.0 if entry["samples"] >= STEADY_SAMPLES else DOUBT
    sliced = str(entry.get("test")).startswith(_SLICE)
    return SpeedTest(str(entry["model"]), parts, longer, doubt, sliced)


def _teaching(record: Record, planned: PlannedModel) -> list[dict[str, Any]]:
    """The tests of a record that can teach, as they are kept."""
    problem, placement, devices = planned.problem, planned.plan.placement, planned.plan.devices
    power = record.identity.power or {}
    if record.status != "ok" or record.identity.environment or power.get("on_battery") is True:
        return []
    if placement.parallel != 1 or placement.load_mtp or any(device.kind == "rpc" for device in devices):
        return []
    placed, owners = place_tensors(problem, placement)
    least = max(LEAST_BYTES, LEAST_CACHES * (planned.surroundings.machine.cpu.llc_bytes or 0))
    if sum(item.tensor.nbytes for item in placed) < least:
        return []
    load = active_work(problem.shape, placed, owners)
    common = _common(planned, load, record.identity.placement, record.when)
    found = []
    for test in filter(_is_sound, record.tests):
        workload = Workload(test.prompt, test.generate, test.depth)
        kind, terms = _terms(workload, planned, load)
        if _has_its_threads(kind, terms, planned):
            measured = {"tps": test.median_tps, "samples": len(test.samples_ns)}
            found.append({**common, "test": test.name, "kind": kind, "terms": terms, **measured})
    return found


def _common(planned: PlannedModel, load: Load, placement: str, when: str) -> dict[str, Any]:
    """What all tests of a model placed one way have in common, as it is kept."""
    return {
        "model": model_key(planned.problem.shape),
        "placement": placement,
        "when": when,
        "ram_bps": planned.surroundings.speeds.ram_bps,
        "several_gpus": several_gpus(load, {device.name: device.kind for device in planned.plan.devices}),
    }


def _is_sound(test: TestResult) -> bool:
    """Long enough, either decode or prefill, and steady as far as its samples tell."""
    from qnext.bench.statistics import sample_warnings

    tokens, least = (test.prompt, LEAST_READ) if test.prompt else (test.generate, LEAST_DECODED)
    if bool(test.prompt) == bool(test.generate) or tokens * len(test.samples_ns) < least:
        return False
    return all(warning.kind == "few_samples" for warning in sample_warnings(test.samples_ns))


def _terms(workload: Workload, planned: PlannedModel, load: Load) -> tuple[str, dict[str, float]]:
    """What was measured, and the terms of its forecast without any history."""
    problem, placement, devices = planned.problem, planned.plan.placement, planned.plan.devices
    speeds = replace(planned.surroundings.speeds, history=NOTHING_LEARNT)
    if not workload.prompt:
        return "decode", decode_terms(load, placement, devices, speeds, workload)
    kinds = {device.name: device.kind for device in devices}
    return "prefill", prefill_terms(load, problem.shape, kinds, placement, speeds, workload)


def _has_its_threads(kind: str, terms: Mapping[str, float], planned: PlannedModel) -> bool:
    """Whether the CPU, if it has a part, worked with half of its cores at least, in decode not with more."""
    placement, cores = planned.plan.placement, planned.surroundings.speeds.cores
    if not any(term.startswith("cpu_") for term in terms):
        return True
    if kind == "decode":
        return cores <= 2 * placement.threads <= 2 * cores
    return cores <= 2 * placement.threads_batch
