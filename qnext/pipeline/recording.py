"""Builds the record of a run: identity, plan, allocation, and each test with its forecast.

The identity holds what is known to move speeds between two runs that look alike: another driver, a governor
or a battery, a power limit, memory that reads slower than before, a variable in the environment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from qnext import __version__
from qnext.bench.names import Scenario
from qnext.bench.statistics import summarise
from qnext.engine.build import EngineBuild
from qnext.engine.dry_run import header_digest
from qnext.engine.environment import inherited
from qnext.hardware import Gpu, Machine, machine_fingerprint, machine_to_dict
from qnext.hardware.battery import on_battery
from qnext.pipeline.planning import PlannedModel
from qnext.plan.budgets import engine_name
from qnext.plan.values import HOST, DeviceMemory, Workload
from qnext.store.identity import digest_of, model_digest, new_record_id, utc_now
from qnext.store.record import EngineIdentity, Identity, Kind, Record, TestResult


def new_record(
    planned: PlannedModel,
    build: EngineBuild,
    kind: Kind,
    allocated: tuple[DeviceMemory, ...],
    command: Sequence[str],
    workload: dict[str, object],
    facts: Mapping[str, object] | None = None,
) -> Record:
    """A record in status `running`, ready to take tests. `workload` names what is measured.

    `facts` is what the engine said on opening the model; of it `system_info` and `model_desc` are kept.
    """
    machine, chosen = planned.surroundings.machine, planned.plan.placement
    placement, header, facts = asdict(chosen), planned.model.header, facts or {}
    names = {engine_name(gpu, position): gpu for position, gpu in enumerate(machine.gpus)}
    gpus = {name: names[name] for name in chosen.devices if name in names}
    return Record(
        id=new_record_id(),
        when=utc_now(),
        status="running",
        kind=kind,
        model_ref=planned.plan.model_ref,
        identity=Identity(
            model_digest=model_digest(planned.model.header.paths),
            quant=planned.model.shape.quant,
            engine=EngineIdentity(
                name=build.name,
                version=build.version,
                llama_commit=build.llama_commit,
                build=f"{build.digest} {'+'.join(build.backends)}",
                flags=_text(facts.get("system_info")),
            ),
            machine=machine_fingerprint(machine),
            placement=digest_of(placement),
            workload=digest_of(workload),
            header_digest=header_digest(header),
            model_type=_text(facts.get("model_desc")),
            model_bytes=sum(tensor.nbytes for tensor in header.tensors),
            model_params=sum(math.prod(tensor.shape) for tensor in header.tensors),
            devices=tuple(_named(name, gpus.get(name)) for name in chosen.devices),
            driver=next((gpu.driver for gpu in gpus.values() if gpu.driver), None),
            context=chosen.context,
            slots=chosen.parallel,
            kv_type_k=chosen.kv_type_k,
            kv_type_v=chosen.kv_type_v,
            bandwidths=_bandwidths(machine, gpus),
            power=_power(machine, gpus),
            environment={found.name: found.value for found in inherited() if found.reaches_engine},
        ),
        planned=planned.plan.devices,
        allocated=allocated,
        placement=placement,
        machine=machine_to_dict(machine),
        command=("qnext", __version__, *command),
        workload=workload,
    )


def _text(value: object) -> str | None:
    return str(value).strip() or None if value is not None else None


def _named(name: str, gpu: Gpu | None) -> str:
    return f"{name} {gpu.name}" if gpu is not None and gpu.name else name


def _bandwidths(machine: Machine, gpus: Mapping[str, Gpu]) -> dict[str, int]:
    """Measured rates in bytes per second; what was not measured is left out."""
    found = {"ram": machine.memory.measured_bandwidth_bps}
    for name, gpu in gpus.items():
        found |= {f"{name} h2d": gpu.h2d_pinned_bps, f"{name} d2h": gpu.d2h_pinned_bps}
    return {name: rate for name, rate in found.items() if rate}


def _power(machine: Machine, gpus: Mapping[str, Gpu]) -> dict[str, str | int | bool]:
    """What governs the clocks, as far as it is known."""
    found: dict[str, str | int | bool | None] = {
        "governor": machine.cpu.governor,
        "profile": machine.cpu.power_profile,
        "on_battery": on_battery(),
        **{f"{name} limit_w": gpu.power_limit_w for name, gpu in gpus.items()},
    }
    return {name: value for name, value in found.items() if value is not None}


def test_result(scenario: Scenario, samples_ns: Sequence[int], planned: PlannedModel) -> TestResult:
    """One test's samples with median, spread, forecast and share of the bandwidth ceiling.

    The ceiling is the decode speed at which RAM would be read at its full measured bandwidth; it is given
    for pure decode on the CPU only, where nothing else bounds it.
    """
    median, low, high = summarise(samples_ns, scenario.tokens)
    decode = scenario.prompt == 0
    prediction = planned.forecast(Workload(scenario.prompt, scenario.generate, scenario.depth))
    return TestResult(
        name=scenario.name,
        prompt=scenario.prompt,
        generate=scenario.generate,
        depth=scenario.depth,
        samples_ns=tuple(samples_ns),
        median_tps=median,
        low_tps=low,
        high_tps=high,
        predicted_tps=prediction.decode_tps if decode else prediction.prefill_tps,
        bandwidth_share=bandwidth_share(planned, scenario, median) if decode else None,
    )


def bandwidth_share(planned: PlannedModel, scenario: Scenario, tps: float) -> float | None:
    """Bytes of RAM read per second at `tps` over the measured bandwidth; None when either is unknown.

    A token reads the active weights, the recurrent state and the cache as far as it is filled, on average
    `depth` tokens and half of those generated.
    """
    plan, ram_bps = planned.plan, planned.surroundings.speeds.ram_bps
    weights = next(
        (
            reason.numbers.get("host_bytes_per_token")
            for reason in plan.reasons
            if reason.what == "speed forecast"
        ),
        None,
    )
    on_host_only = not plan.placement.devices and plan.devices[0].name == HOST
    if not on_host_only or not ram_bps or not isinstance(weights, int):
        return None
    host, placement = plan.devices[0], plan.placement
    filled = min(1.0, (scenario.depth + scenario.generate / 2) / placement.context)
    state = host.kv_bytes * filled + host.recurrent_bytes / placement.parallel
    return round((weights + state) * tps / ram_bps, 4)
