"""Finds the placement: experts of the first layers on the GPUs, of the tail on the CPU, as much as fits.

Why so: what lives in RAM is multiplied by the CPU, so every expert layer on a GPU saves its share of the RAM
traffic that bounds decode, while attention, cache and shared experts are used for every token and belong on
the GPU first. Keeping the head of the model on the GPU lets it prefill while the tail's experts are copied.

What the user forces stays as it is and the rest is sought around it: `-ot` rules go first, `-ncmoe` fixes the
expert layers, `-ngl` the number of layers, `-ts` the split. Host RAM never steers the search, because every
byte moved to a GPU relieves it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace

from qnext.models.header import ModelHeader
from qnext.models.shape import ModelShape, layer_of
from qnext.plan.expert_rules import expert_pattern
from qnext.plan.memory import MemoryPlan, plan_memory
from qnext.plan.options import PlanOptions, RepackPolicy
from qnext.plan.overrides import checked_overrides, repack_overrides
from qnext.plan.speed import MachineSpeeds
from qnext.plan.split import deal_layers, layer_costs
from qnext.plan.traits import DeviceTraits
from qnext.plan.values import CPU_REPACK, HOST, Budget, Override, Placement
from qnext.plan.weights import layer_devices

ALL_LAYERS = 999
"""`-ngl` for "everything, the output layer too", the value llama.cpp's users write."""

_DEAL_ROUNDS = 4
_GUESSES = 5
"""Checks whose number of layers is reckoned from what they cost; later ones halve what is left."""


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

    def may_repack(self, placement: Placement) -> bool:
        """Whether the CPU's weights may be laid out anew: no GPU wants to read them as they are."""
        return all(device.kind == "rpc" for device in self.used(placement))

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
    best = min(tried, key=lambda placed: sum(placed.missing.values()))
    repacked = any(rule.buffer == CPU_REPACK for rule in options.overrides)
    if best.placement.devices and problem.may_repack(best.placement) and not repacked:
        laid_out = check_placement(problem, with_layout(problem, best.placement, options.repack))
        return laid_out if laid_out.fits or not best.fits else best
    return best


def with_layout(problem: Problem, placement: Placement, layout: RepackPolicy) -> Placement:
    """A placement with devices, the CPU's weights laid out as `layout` says.

    That is for devices without pinned memory which do no work for the CPU's weights (RPC). A GPU multiplies
    those of long prompts itself, and can copy them in the file's layout only.
    """
    bare = tuple(rule for rule in placement.overrides if rule.buffer != CPU_REPACK)
    placement = replace(placement, extra_buffers=layout == "full", overrides=bare)
    if layout != "experts":
        return placement
    inside = set(placement.cpu_expert_layers)
    tensors = tuple(one for one in problem.header.tensors if layer_of(one.name) in inside)
    rules = repack_overrides(replace(problem.header, tensors=tensors), problem.traits[HOST])
    users = len(problem.options.overrides)
    return replace(placement, overrides=(*bare[:users], *rules, *bare[users:]))


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
    one layer on the CPU does not. From there on, more on the CPU always fits better, and what the layers
    cost tells how many to move next, so that a few exact checks are enough.
    """
    total = 0 if problem.shape.dense else problem.shape.n_layer
    dealer = _Dealer(problem, base)

    def check(count: int) -> Placed:
        return dealer.deal(_with_cpu_experts(problem, base, _tail(total, count)))

    best = check(0)
    if best.gpus_fit or total == 0:
        return best
    best = check(total)
    if not best.gpus_fit:
        return best
    low, high = 0, total  # the largest known to fail, the smallest known to fit
    for step in range(total):
        if high - low <= 1:
            break
        guess = (low + high) // 2
        if step < _GUESSES:
            guess = dealer.fewest_that_seem_to_fit(range(low + 1, high)) or high - 1
        candidate = check(guess)
        if candidate.gpus_fit:
            best, high = candidate, guess
        else:
            low = guess
    return best


def _tail(total: int, count: int) -> tuple[int, ...]:
    return tuple(range(total - count, total))


def _most_layers(problem: Problem, base: Placement) -> Placed:
    """Most whole layers on the GPUs; for a mixture of experts, without any of their experts.

    For a dense model this is the way; for a mixture of experts it is the way out when the GPU is too small
    even for attention and cache. `-ngl` takes the last layers, the output layer first.
    """
    options, shape = problem.options, problem.shape
    head = shape.n_layer if options.cpu_experts is None else min(options.cpu_experts, shape.n_layer)
    dealer = _Dealer(problem, base)
    base = _with_cpu_experts(problem, base, tuple(range(head)))
    low, high = 0, shape.n_layer_all
    if options.overrides:
        low, best = 1, dealer.deal(replace(base, n_gpu_layers=1))
    else:
        best = check_placement(problem, on_cpu(problem, base))
    while low < high:
        middle = (low + high + 1) // 2
        candidate = dealer.deal(replace(base, n_gpu_layers=middle))
        if candidate.gpus_fit:
            best, low = candidate, middle
        else:
            high = middle - 1
    return best


def _dealt(problem: Problem, placement: Placement) -> Placed:
    return _Dealer(problem, placement).deal(placement)


class _Dealer:
    """Deals a placement's layers to its devices in order, each filled as far as it goes.

    The first deal knows only what each layer costs; the exact check then says what each device needs beside
    its layers (compute buffer, padding), and they are dealt again. Later deals begin with the least that any
    check has shown. Devices without a layer are left out.
    """

    def __init__(self, problem: Problem, base: Placement) -> None:
        self._problem, self._base = problem, base
        self._budgets = {budget.name: budget.budget_bytes for budget in problem.budgets}
        whole = replace(base, n_gpu_layers=ALL_LAYERS)
        bare = _with_cpu_experts(problem, whole, tuple(range(problem.shape.n_layer)))
        self._full = layer_costs(problem.header, problem.shape, whole, problem.traits)
        self._bare = self._full
        if bare != whole:
            self._bare = layer_costs(problem.header, problem.shape, bare, problem.traits)
        self._least = {name: (problem.compute or {}).get(name, 0) for name in base.devices}
        self._latest = dict(self._least)
        self._known: set[str] = set()

    def deal(self, placement: Placement) -> Placed:
        """The placement on as many of its devices as it needs, or the deal that lacks least."""
        problem, devices = self._problem, placement.devices
        if len(devices) < 2 or placement.tensor_split is not None:
            placed = check_placement(problem, placement)
            self._learn(placed)
            return placed
        beside = dict(self._least)
        best: Placed | None = None
        for _ in range(_DEAL_ROUNDS):
            counts = self._counts(placement, beside)
            kept = [(name, count) for name, count in zip(devices, counts, strict=True) if count]
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
            before, needs = dict(beside), self._learn(candidate)
            if candidate.gpus_fit:
                break
            beside.update({name: max(beside[name], size) for name, size in needs.items()})
            if beside == before:
                break
        assert best is not None
        return best

    def fewest_that_seem_to_fit(self, counts: range) -> int | None:
        """The first number of tail layers with experts on the CPU that fits with what is known so far."""
        found = bisect_left(counts, True, key=self._seems_to_fit)
        return counts[found] if found < len(counts) else None

    def _seems_to_fit(self, cpu_expert_layers: int) -> bool:
        tail = _tail(self._problem.shape.n_layer, cpu_expert_layers)
        placement = _with_cpu_experts(self._problem, self._base, tail)
        position, costs = 0, self._costs(placement)
        for name, number in zip(self._base.devices, self._counts(placement, self._latest), strict=True):
            if sum(costs[position : position + number]) > self._budgets[name] - self._latest[name]:
                return False
            position += number
        return True

    def _costs(self, placement: Placement) -> list[int]:
        """Bytes of each layer that moves, the output layer last."""
        in_ram = frozenset(placement.cpu_expert_layers)
        both = enumerate(zip(self._full, self._bare, strict=True))
        costs = [bare if layer in in_ram else full for layer, (full, bare) in both]
        return costs[max(len(costs) - placement.n_gpu_layers, 0) :]

    def _counts(self, placement: Placement, beside: Mapping[str, int]) -> list[int]:
        """Layers of each device: by a forced split, else as many as fit beside what else it needs."""
        if placement.tensor_split is not None:
            homes = layer_devices(self._problem.shape, placement, self._problem.used(placement))
            return [homes.count(name) for name in placement.devices]
        rooms = [self._budgets[name] - beside[name] for name in placement.devices]
        return deal_layers(self._costs(placement), rooms)

    def _learn(self, placed: Placed) -> dict[str, int]:
        """What each device needs beside its layers, by an exact check."""
        placement, needs, position = placed.placement, {}, 0
        costs = self._costs(placement)
        totals = {device.name: device.total_bytes for device in placed.memory.devices}
        counts = self._counts(placement, {}) if placement.tensor_split else [len(costs)]
        for name, count in zip(placement.devices, counts, strict=True):
            needs[name] = totals[name] - sum(costs[position : position + count])
            position += count
            known = self._least[name] if name in self._known else needs[name]
            self._least[name] = min(known, needs[name])
        self._known |= set(needs)
        self._latest.update(needs)
        return needs
