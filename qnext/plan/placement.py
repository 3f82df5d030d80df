"""Finds the placement: experts of the first layers on the GPUs, of the tail on the CPU, as much as fits.

Why so: what lives in RAM is multiplied by the CPU, so every expert layer on a GPU saves its share of the RAM
traffic that bounds decode, while attention, cache and shared experts are used for every token and belong on
the GPU first. Keeping the head of the model on the GPU lets it prefill while the tail's experts are copied.

What the user forces stays as it is and the rest is sought around it: `-ot` rules go first, `-ncmoe` fixes the
expert layers, `-ngl` the number of layers, `-ts` the split. Host RAM never steers the search, because every
byte moved to a GPU relieves it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from qnext.models.header import ModelHeader
from qnext.models.shape import ModelShape
from qnext.plan.flags import expert_pattern
from qnext.plan.memory import MemoryPlan, plan_memory
from qnext.plan.options import PlanOptions
from qnext.plan.overrides import checked_overrides, repack_overrides
from qnext.plan.speed import MachineSpeeds
from qnext.plan.split import deal_layers, layer_costs
from qnext.plan.traits import DeviceTraits
from qnext.plan.values import HOST, Budget, Override, Placement

ALL_LAYERS = 999
"""`-ngl` for "everything, the output layer too", the value llama.cpp's users write."""

_DEAL_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class Problem:
    """What a placement is sought for. `traits` maps device names to how they store tensors, host included.

    `compute` holds compute-buffer bytes per device from a dry run, None to use the estimate. `rpc_servers`
    are the endpoints behind the RPC devices of `budgets`. `speeds` are what a choice between placements that
    fit is made by; without them the largest ubatch wins.
    """

    header: ModelHeader
    shape: ModelShape
    budgets: tuple[Budget, ...]
    traits: Mapping[str, DeviceTraits]
    options: PlanOptions
    compute: Mapping[str, int] | None = None
    rpc_servers: tuple[str, ...] = ()
    speeds: MachineSpeeds | None = None

    def memory(self, placement: Placement) -> MemoryPlan:
        """Bytes per device of one placement."""
        return plan_memory(
            self.header,
            self.shape,
            placement,
            self.budgets,
            host=self.traits[HOST],
            devices=self.used(placement),
            compute=self.compute,
        )

    def used(self, placement: Placement) -> list[DeviceTraits]:
        """Traits of the devices that a placement uses, in its order."""
        return [self.traits[name] for name in placement.devices]

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

    @property
    def gpus_fit(self) -> bool:
        """Whether every device but the host does."""
        return all(name == HOST for name in self.missing)


def check_placement(problem: Problem, placement: Placement) -> Placed:
    """The memory of a placement against the budgets."""
    memory = problem.memory(placement)
    missing = {
        device.name: device.total_bytes - device.budget_bytes
        for device in memory.devices
        if device.budget_bytes is not None and device.total_bytes > device.budget_bytes
    }
    return Placed(placement, memory, missing)


def find_placement(problem: Problem, base: Placement) -> Placed:
    """The best placement of the problem's model; `base` holds context, cache types, threads and the like.

    When nothing fits, the placement returned is the one that lacks least. Raises UsageError for an override
    that names no buffer type of these devices.
    """
    options = problem.options
    devices = problem.offload_devices()
    if not devices or options.n_gpu_layers == 0:
        return check_placement(problem, on_cpu(problem, base))
    base = replace(
        base,
        devices=devices,
        n_gpu_layers=ALL_LAYERS if options.n_gpu_layers is None else options.n_gpu_layers,
        extra_buffers=False,
        tensor_split=options.tensor_split,
        overrides=checked_overrides(problem.header, options.overrides, problem.traits),
    )
    if options.cpu_experts is None:
        tried = [_fewest_cpu_experts(problem, base)]
    else:
        head = range(min(options.cpu_experts, problem.shape.n_layer))
        tried = [_dealt(problem, _with_cpu_experts(problem, base, tuple(head)))]
    if not tried[-1].gpus_fit and options.n_gpu_layers is None:
        tried.append(_most_layers(problem, base))
    forced = options.cpu_experts is not None or options.overrides or options.n_gpu_layers is not None
    if not tried[-1].gpus_fit and not forced:
        tried.append(check_placement(problem, on_cpu(problem, base)))
    return min(tried, key=lambda placed: sum(placed.missing.values()))


def on_cpu(problem: Problem, base: Placement) -> Placement:
    """Everything in host memory, laid out as the repack policy says."""
    host, repack = problem.traits[HOST], problem.options.repack
    overrides = checked_overrides(problem.header, problem.options.overrides, {HOST: host})
    if repack == "experts":
        overrides += repack_overrides(problem.header, host)
    return replace(
        base,
        devices=(),
        n_gpu_layers=0,
        tensor_split=None,
        cpu_expert_layers=(),
        extra_buffers=repack == "full",
        overrides=overrides,
    )


def _with_cpu_experts(problem: Problem, base: Placement, layers: tuple[int, ...]) -> Placement:
    """`base` with the routed experts of `layers` on the CPU, after the overrides it has already."""
    if problem.shape.dense or not layers:
        return base
    rule = Override(expert_pattern(layers), HOST)
    return replace(base, cpu_expert_layers=layers, overrides=(*base.overrides, rule))


def _fewest_cpu_experts(problem: Problem, base: Placement) -> Placed:
    """Fewest tail layers with experts on the CPU.

    None at all is tried first: it alone needs no room on the GPU to copy CPU experts to, so it may fit where
    one layer on the CPU does not. From there on, more on the CPU always fits better, and the bytes that are
    over or left tell how many layers to move next, so that a few exact checks are enough.
    """
    total = 0 if problem.shape.dense else problem.shape.n_layer

    def check(count: int) -> Placed:
        return _dealt(problem, _with_cpu_experts(problem, base, tuple(range(total - count, total))))

    best = check(0)
    if best.gpus_fit or total == 0:
        return best
    best = check(total)
    if not best.gpus_fit:
        return best
    return _search(check, best, _expert_bytes(problem))


def _search(check: Callable[[int], Placed], best: Placed, expert_bytes: list[int]) -> Placed:
    """The smallest count from 1 on whose check fits the GPUs; `best` is that of all layers, which does."""
    low, high = 0, len(expert_bytes)  # the largest known to fail, the smallest known to fit
    guess, spare = high, _spare(best)
    for step in range(high):
        if high - low <= 1:
            break
        while guess > low and spare >= expert_bytes[-guess]:
            spare -= expert_bytes[-guess]
            guess -= 1
        while guess < high and spare < 0:
            spare += expert_bytes[-guess - 1]
            guess += 1
        guess = (low + high) // 2 if step > 5 else min(max(guess, low + 1), high - 1)
        candidate = check(guess)
        spare = _spare(candidate)
        if candidate.gpus_fit:
            best, high = candidate, guess
        else:
            low = guess
    return best


def _spare(placed: Placed) -> int:
    """Bytes the devices have left; negative is what the worst of them lacks."""
    left = [
        device.budget_bytes - device.total_bytes
        for device in placed.memory.devices
        if device.name != HOST and device.budget_bytes is not None
    ]
    return min(left, default=0) if min(left, default=0) < 0 else sum(left)


def _expert_bytes(problem: Problem) -> list[int]:
    return [layer.expert_bytes for layer in problem.shape.layer_bytes[: problem.shape.n_layer]]


def _most_layers(problem: Problem, base: Placement) -> Placed:
    """Most whole layers on the GPUs; for a mixture of experts, without any of their experts.

    For a dense model this is the way; for a mixture of experts it is the way out when the GPU is too small
    even for attention and cache. `-ngl` takes the last layers, the output layer first.
    """
    options, shape = problem.options, problem.shape
    head = shape.n_layer if options.cpu_experts is None else min(options.cpu_experts, shape.n_layer)
    base = _with_cpu_experts(problem, base, tuple(range(head)))
    low, high = 0, shape.n_layer_all
    if options.overrides:
        low, best = 1, _dealt(problem, replace(base, n_gpu_layers=1))
    else:
        best = check_placement(problem, on_cpu(problem, base))
    while low < high:
        middle = (low + high + 1) // 2
        candidate = _dealt(problem, replace(base, n_gpu_layers=middle))
        if candidate.gpus_fit:
            best, low = candidate, middle
        else:
            high = middle - 1
    return best


def _dealt(problem: Problem, placement: Placement) -> Placed:
    """The placement's layers dealt to its devices in order, each filled as far as it goes.

    The first deal knows only what each layer costs; the exact check then says what each device needs beside
    its layers (compute buffer, padding), and they are dealt again. Devices without a layer are left out.
    """
    if len(placement.devices) < 2 or placement.tensor_split is not None:
        return check_placement(problem, placement)
    costs = layer_costs(problem.header, problem.shape, placement, problem.traits)
    budgets = {budget.name: budget.budget_bytes for budget in problem.budgets}
    beside = {name: (problem.compute or {}).get(name, 0) for name in placement.devices}
    best: Placed | None = None
    for _ in range(_DEAL_ROUNDS):
        counts = deal_layers(costs, [budgets[name] - beside[name] for name in placement.devices])
        kept = [(name, count) for name, count in zip(placement.devices, counts, strict=True) if count]
        candidate = check_placement(
            problem,
            replace(
                placement,
                devices=tuple(name for name, _ in kept),
                tensor_split=tuple(float(count) for _, count in kept) if len(kept) > 1 else None,
            ),
        )
        if best is None or sum(candidate.missing.values()) < sum(best.missing.values()):
            best = candidate
        if candidate.gpus_fit:
            return candidate
        before, position = dict(beside), 0
        totals = {device.name: device.total_bytes for device in candidate.memory.devices}
        for name, count in kept:
            beside[name] = max(beside[name], totals[name] - sum(costs[position : position + count]))
            position += count
        if beside == before:
            break
    assert best is not None
    return best
