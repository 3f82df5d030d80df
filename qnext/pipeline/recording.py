"""Builds the record of a run: identity, plan, allocation, and each test with its forecast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from qnext import __version__
from qnext.bench.names import Scenario
from qnext.bench.statistics import summarise
from qnext.engine.build import EngineBuild
from qnext.hardware import machine_fingerprint, machine_to_dict
from qnext.pipeline.planning import PlannedModel
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
) -> Record:
    """A record in status `running`, ready to take tests. `workload` names what is measured."""
    machine = planned.surroundings.machine
    placement = asdict(planned.plan.placement)
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
            ),
            machine=machine_fingerprint(machine),
            placement=digest_of(placement),
            workload=digest_of(workload),
        ),
        planned=planned.plan.devices,
        allocated=allocated,
        placement=placement,
        machine=machine_to_dict(machine),
        command=("qnext", __version__, *command),
    )


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
