"""Finds the placement: experts of the first layers on the GPUs, of the tail on the CPU, as much as fits.

Why so: what lives in RAM is multiplied by the CPU, so every expert layer on a GPU saves its share of the RAM
traffic that bounds decode, while attention, cache and shared experts are used for every token and belong on
the GPU first. Keeping the head of the model on the GPU lets it prefill while the tail's experts are copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from qnext.models.header import ModelHeader
from qnext.models.shape import ModelShape, is_expert, layer_of
from qnext.plan.flags import expert_pattern
from qnext.plan.memory import MemoryPlan, plan_memory
from qnext.plan.options import PlanOptions
from qnext.plan.traits import DeviceTraits, extra_buffer_accepts
from qnext.plan.values import CPU_REPACK, HOST, Budget, Override, Placement

ALL_LAYERS = 999
"""`-ngl` for "everything, the output layer too", the value llama.cpp's users write."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What a placement is sought for. `traits` maps device names to how they store tensors, host included.

    `compute` holds compute-buffer bytes per device from a dry run, None to use the estimate.
    """

    header: ModelHeader
    shape: ModelShape
    budgets: tuple[Budget, ...]
    traits: Mapping[str, DeviceTraits]
    options: PlanOptions
    compute: Mapping[str, int] | None = None

    def memory(self, placement: Placement) -> MemoryPlan:
        """Bytes per device of one placement."""
        return plan_memory(
            self.header,
            self.shape,
            placement,
            self.budgets,
            host=self.traits[HOST],
            devices=[self.traits[name] for name in placement.devices],
            compute=self.compute,
        )

    def offload_devices(self) -> tuple[str, ...]:
        """Names of the devices beside the host that have any room."""
        return tuple(
            budget.name for budget in self.budgets if budget.name != HOST and budget.budget_bytes > 0
        )


@dataclass(frozen=True, slots=True)
class Placed:
    """A placement with its memory; `missing` maps each device over its budget to the bytes it lacks."""

    placement: Placement
    memory: MemoryPlan
    missing: Mapping[str, int]

    @property
    def fits(self) -> bool:
        """Whether every device stays inside its budget."""
        return not self.missing


def find_placement(problem: Problem, base: Placement) -> Placed:
    """The best placement of the problem's model; `base` holds context, cache types, threads and the like.

    When nothing fits, the placement returned is the one on the host and the devices that lacks least.
    """
    options = problem.options
    devices = problem.offload_devices()
    if not devices or options.n_gpu_layers == 0:
        return _check(problem, on_cpu(problem, base))
    base = replace(
        base,
        devices=devices,
        rpc_servers=base.rpc_servers,
        n_gpu_layers=ALL_LAYERS if options.n_gpu_layers is None else options.n_gpu_layers,
        extra_buffers=False,
        tensor_split=options.tensor_split,
        overrides=options.overrides,
    )
    if options.overrides or options.cpu_experts is not None:
        return _check(problem, _with_forced_experts(problem, base))
    tried: list[Placed] = []
    if not problem.shape.dense:
        tried.append(_most_experts_on_gpu(problem, base))
    if not tried or not _gpus_fit(tried[-1]):
        tried.append(_most_layers_on_gpu(problem, base))
    if not _gpus_fit(tried[-1]):
        tried.append(_check(problem, on_cpu(problem, base)))
    return min(tried, key=lambda placed: sum(placed.missing.values()))


def on_cpu(problem: Problem, base: Placement) -> Placement:
    """Everything in host memory, laid out as the repack policy says."""
    placement = replace(base, devices=(), n_gpu_layers=0, tensor_split=None, cpu_expert_layers=())
    repack = problem.options.repack
    overrides = problem.options.overrides
    if repack == "experts" and not overrides:
        overrides = repack_overrides(problem.header, problem.traits[HOST])
    return replace(placement, extra_buffers=repack == "full", overrides=overrides)


def repack_overrides(header: ModelHeader, host: DeviceTraits) -> tuple[Override, ...]:
    """Overrides that put each routed-expert tensor into CPU_REPACK whose type and shape it supports.

    Anything else in there crashes the engine, so the layers are listed tensor by tensor where they differ.
    """
    layers_of: dict[str, list[int]] = {}
    for tensor in header.tensors:
        layer = layer_of(tensor.name)
        if layer is None or not is_expert(tensor.name):
            continue
        kind = tensor.name.split(".")[2]
        accepted = tensor.name.endswith(".weight") and extra_buffer_accepts(
            CPU_REPACK, tensor, True, host.features
        )
        if accepted:
            layers_of.setdefault(kind, []).append(layer)
    kinds_of: dict[tuple[int, ...], list[str]] = {}
    for kind, layers in layers_of.items():
        kinds_of.setdefault(tuple(sorted(layers)), []).append(kind)
    return tuple(
        Override(rf"blk\.({'|'.join(map(str, layers))})\.({'|'.join(kinds)})\.weight", CPU_REPACK)
        for layers, kinds in kinds_of.items()
    )


def _with_forced_experts(problem: Problem, base: Placement) -> Placement:
    count = min(problem.options.cpu_experts or 0, problem.shape.n_layer)
    return with_cpu_experts(base, tuple(range(count)), problem.options.overrides)


def with_cpu_experts(base: Placement, layers: tuple[int, ...], first: tuple[Override, ...] = ()) -> Placement:
    """`base` with the routed experts of `layers` on the CPU, after the overrides that go `first`."""
    rules = (*first, Override(expert_pattern(layers), HOST)) if layers else first
    return replace(base, cpu_expert_layers=layers, overrides=rules)


def _most_experts_on_gpu(problem: Problem, base: Placement) -> Placed:
    """Fewest tail layers with experts on the CPU. Feasibility on the GPUs is monotone, so bisect."""
    layers = problem.shape.n_layer
    low, high = 0, layers
    best = _check(problem, _split(problem, base, layers))
    if not _gpus_fit(best):
        return best
    while low < high:
        middle = (low + high) // 2
        candidate = _check(problem, _split(problem, base, middle))
        if _gpus_fit(candidate):
            best, high = candidate, middle
        else:
            low = middle + 1
    return best


def _split(problem: Problem, base: Placement, cpu_layers: int) -> Placement:
    """Tail `cpu_layers` layers keep experts on the CPU; layers are dealt to several GPUs first come."""
    total = problem.shape.n_layer
    placement = with_cpu_experts(base, tuple(range(total - cpu_layers, total)))
    if len(base.devices) < 2 or base.tensor_split is not None:
        return placement
    return replace(placement, tensor_split=_deal_layers(problem, placement))


def _deal_layers(problem: Problem, placement: Placement) -> tuple[float, ...]:
    """Layer counts per device: fill each in turn, but leave later ones what the tail needs.

    The cost of a layer is its share of everything the devices hold in this placement; the output layer and
    the rounding are checked afterwards by the exact arithmetic.
    """
    shape = problem.shape
    single = replace(placement, devices=placement.devices[:1], tensor_split=None)
    whole = problem.memory(single).devices[1]
    moved = set(placement.cpu_expert_layers)
    weights = [
        layer.other_bytes + (0 if index in moved else layer.expert_bytes)
        for index, layer in enumerate(shape.layer_bytes)
    ]
    state = (whole.kv_bytes + whole.recurrent_bytes) / max(1, len(weights))
    costs = [weight + state for weight in weights]
    costs.append(max(0, whole.weights_bytes - sum(weights)))
    by_name = {budget.name: budget.budget_bytes for budget in problem.budgets}
    counts: list[float] = []
    position = 0
    for index, name in enumerate(placement.devices):
        compute = (problem.compute or {}).get(name, whole.compute_bytes)
        room, count = float(by_name[name] - compute), 0
        last = index == len(placement.devices) - 1
        while position < len(costs) and (last or room >= costs[position]):
            room -= costs[position]
            position += 1
            count += 1
        counts.append(float(count))
    return tuple(counts)


def _most_layers_on_gpu(problem: Problem, base: Placement) -> Placed:
    """Most whole layers on the GPUs; for a mixture of experts, without any of their experts.

    For a dense model this is all there is. For a mixture of experts it is the way out when the GPU is too
    small even for attention and cache.
    """
    total = problem.shape.n_layer_all + 1
    layers = () if problem.shape.dense else tuple(range(problem.shape.n_layer))
    base = with_cpu_experts(base, layers)
    low, high = 0, total
    best = _check(problem, replace(base, n_gpu_layers=0))
    while low < high:
        middle = (low + high + 1) // 2
        candidate = _check(problem, replace(base, n_gpu_layers=ALL_LAYERS if middle == total else middle))
        if _gpus_fit(candidate):
            best, low = candidate, middle
        else:
            high = middle - 1
    return best


def _check(problem: Problem, placement: Placement) -> Placed:
    memory = problem.memory(placement)
    return Placed(placement, memory, missing_bytes(memory))


def missing_bytes(memory: MemoryPlan) -> dict[str, int]:
    """Bytes each device lacks, only those over their budget."""
    return {
        device.name: device.total_bytes - device.budget_bytes
        for device in memory.devices
        if device.budget_bytes is not None and device.total_bytes > device.budget_bytes
    }


def _gpus_fit(placed: Placed) -> bool:
    return all(name == HOST for name in placed.missing)
