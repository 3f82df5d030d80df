"""Bytes per device for one placement: weights, cache, recurrent state, compute and the rest.

Weights, cache and state are llama.cpp's own arithmetic repeated (`plan.weights`, `plan.cache`) and equal what
it allocates; the compute buffer is an estimate (`plan.compute`) unless the caller has the figures of a dry
run. Host memory is one pool: plain, mapped, repacked and pinned buffers all come out of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qnext.errors import UsageError
from qnext.models.header import ModelHeader
from qnext.models.shape import ModelShape
from qnext.plan.cache import kv_bytes, output_bytes, recurrent_bytes
from qnext.plan.compute import estimate_compute
from qnext.plan.traits import AMX, DeviceTraits, device_traits, host_traits
from qnext.plan.values import CPU_REPACK, HOST, Budget, DeviceMemory, Placement, Reason
from qnext.plan.weights import (
    MAPPED,
    PlacedTensor,
    assign_buffers,
    buffer_bytes,
    layer_devices,
    maps_file,
    weights_by_device,
)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a placement takes. `devices` are the host and then the placement's devices, in order.

    `buffers` holds the size of each weight buffer under the name llama.cpp prints; `compute_estimated` says
    that `compute_bytes` is the formula's and not a dry run's.
    """

    devices: tuple[DeviceMemory, ...]
    buffers: Mapping[str, int]
    compute_estimated: bool
    reasons: tuple[Reason, ...]


def plan_memory(
    header: ModelHeader,
    shape: ModelShape,
    placement: Placement,
    budgets: Sequence[Budget],
    *,
    host: DeviceTraits | None = None,
    devices: Sequence[DeviceTraits] | None = None,
    compute: Mapping[str, int] | None = None,
) -> MemoryPlan:
    """Memory of `placement` on the devices of `budgets` (which must hold the host and `placement.devices`).

    `host` and `devices` default to what their names tell; pass them to say which instruction sets repack, how
    much memory is free, or what an RPC worker runs on. `compute` are bytes per device from a dry run. Raises
    UsageError for a device without a budget, a bad override or an unusable cache type.
    """
    by_name = {budget.name: budget for budget in budgets}
    missing = [name for name in (HOST, *placement.devices) if name not in by_name]
    if missing:
        raise UsageError(
            f"no memory is known for device {missing[0]}",
            hint=f"Give it with --device-memory {missing[0]}=SIZE.",
        )
    host = host or host_traits()
    if devices is None:
        devices = [device_traits(by_name[name]) for name in placement.devices]
    traits = {HOST: host} | {device.name: device for device in devices}

    layers = layer_devices(shape, placement, devices)
    placed = assign_buffers(header, shape, placement, host, devices)
    buffers = buffer_bytes(placed, placement, devices)
    weights = weights_by_device(buffers, devices)
    kv = kv_bytes(shape, placement, layers, traits)
    recurrent = recurrent_bytes(shape, placement, layers, traits)
    estimated = compute is None
    if compute is None:
        compute = estimate_compute(shape, placement, placed, layers, devices)
    memory = tuple(
        DeviceMemory(
            name=name,
            kind=by_name[name].kind,
            budget_bytes=by_name[name].budget_bytes,
            weights_bytes=weights.get(name, 0),
            kv_bytes=kv.get(name, 0),
            recurrent_bytes=recurrent.get(name, 0),
            compute_bytes=compute.get(name, 0),
            other_bytes=output_bytes(shape, placement) if name == HOST else 0,
        )
        for name in (HOST, *placement.devices)
    )
    return MemoryPlan(memory, buffers, estimated, _reasons(placed, placement, buffers))


def _reasons(
    placed: Sequence[PlacedTensor], placement: Placement, buffers: Mapping[str, int]
) -> tuple[Reason, ...]:
    copies = buffers.get(CPU_REPACK, 0) + buffers.get(AMX, 0)
    if not maps_file(placement) or MAPPED not in buffers:
        return ()
    used = sum(item.tensor.nbytes for item in placed if item.buffer == HOST)
    unused = buffers[MAPPED] - used
    if unused <= 0 and not copies:
        return ()
    return (
        Reason(
            what="weights are in RAM twice" if copies else "mapped pages nobody reads",
            because=(
                "a mapped file spans everything between its first and last CPU tensor, beside the repacked"
                " copies and what was sent to other devices; load mode none keeps only what is used"
            ),
            numbers={"mapped_bytes": buffers[MAPPED], "unused_bytes": unused, "repacked_bytes": copies},
        ),
    )
