"""Which layers go to which device and which leave their experts in RAM: the room of all devices packed best.

`find_placement` fills the devices in order and leaves the tail's experts in RAM. With the same room they may
hold more: a small layer instead of a large one (quants such as Q4_K_M give half of the layers larger
experts), another cut between devices, so that what is left on each is worth least, or the same layers on a
device that reads faster. A device that is slow or far may even be better left out. Where the devices could
hold everything but for the copies of their pipeline, they do without it.

Experts stay on the device of their own layer or in RAM. Where another device has room for them, the cut
moves; a layer on two devices would cross between them twice, which the forecast has no price for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import combinations

from qnext.plan.cut import DeviceShare, Packed, best_cut
from qnext.plan.expert_rules import expert_pattern
from qnext.plan.layer_prices import NO_PIPELINE, LayerPrice, compute_needs, fixed_seconds, price_layers
from qnext.plan.placement import Placed, Problem, check_placement
from qnext.plan.turn import placed_seconds
from qnext.plan.values import HOST, Override, Placement
from qnext.plan.weights import layer_devices

_CHECKS = 6
"""Packings that are checked exactly, the most promising first."""
_AS_GOOD = 1.005
"""How much longer a turn may be for the sake of a pipeline, whose gain the forecast does not know."""
_MOST_CHOSEN_FROM = 4
"""With more GPUs than this, leaving out some of them is not tried."""


def pack_experts(problem: Problem, placed: Placed) -> Placed:
    """`placed`, or a packing of the same context and ubatch whose turn is shorter and that fits.

    Obeys a forced split, number of layers or of expert layers; leaves alone what has overrides, and machines
    whose speeds are not known.
    """
    placement, options = placed.placement, problem.options
    if problem.speeds is None or options.overrides or not placement.devices:
        return placed
    if problem.offload_devices() == placement.devices[:1] and not placement.cpu_expert_layers:
        return placed
    packer = _Packer(problem, placement)
    placed = _check(problem, placement)
    waiting = [found for names in packer.choices() if (found := packer.pack(names))]
    for _ in range(_CHECKS):
        if not waiting:
            break
        number, (seconds, candidate) = min(enumerate(waiting), key=lambda one: one[1][0])
        if candidate == placement:
            break
        checked = _check(problem, candidate)
        if checked.placement != candidate:
            checked = _with_pipeline(problem, packer, seconds, candidate) or checked
        if checked.fits:
            return checked if placed_seconds(problem, checked) < placed_seconds(problem, placed) else placed
        packer.learn(checked)
        again = packer.pack(candidate.devices)
        if again is not None and again[1] != candidate:
            waiting[number] = again
        else:
            del waiting[number]
    return placed


def _check(problem: Problem, placement: Placement) -> Placed:
    """The exact check of a placement, without its pipeline where that has no room.

    The compute buffers of a dry run may be those of another placement that had no pipeline, so the estimate
    has to agree.
    """
    checked = check_placement(problem, placement)
    everything = not placement.overrides and placement.n_gpu_layers > problem.shape.n_layer_all
    if len(placement.devices) < 2 or not everything:
        return checked
    estimated = checked
    if problem.compute is not None:
        estimated = check_placement(replace(problem, compute=None), placement)
    if checked.fits and estimated.fits:
        return checked
    return check_placement(problem, replace(placement, overrides=(NO_PIPELINE,)))


def _with_pipeline(problem: Problem, packer: _Packer, seconds: float, candidate: Placement) -> Placed | None:
    """Another cut between the same devices that takes hardly longer and leaves room for their pipeline."""
    estimated = replace(problem, compute=None)
    alone = replace(candidate, overrides=(NO_PIPELINE,))
    both = (check_placement(estimated, one).memory.devices for one in (candidate, alone))
    copies = {one.name: one.compute_bytes - other.compute_bytes for one, other in zip(*both, strict=True)}
    found = packer.pack(candidate.devices, copies)
    if found is None or found[1].overrides or found[0] > seconds * _AS_GOOD:
        return None
    checked = _check(problem, found[1])
    return checked if checked.fits and checked.placement == found[1] else None


class _Packer:
    """Packs one placement's layers on any choice of devices."""

    def __init__(self, problem: Problem, placement: Placement) -> None:
        self._problem, self._placement = problem, placement
        shape, options = problem.shape, problem.options
        self._first = max(0, shape.n_layer_all + 1 - placement.n_gpu_layers)
        moved = frozenset(range(self._first, shape.n_layer))
        fixed = frozenset(placement.cpu_expert_layers) if options.cpu_experts is not None else None
        self._free = moved if fixed is None and not shape.dense else frozenset()
        self._in_ram = fixed or frozenset()
        self._stay = tuple(layer for layer in placement.cpu_expert_layers if layer < self._first)
        self._budgets = {budget.name: budget.budget_bytes for budget in problem.budgets}
        self._lacking: dict[tuple[str, ...], dict[str, int]] = {}
        self._prices: Mapping[str, list[LayerPrice]] = price_layers(problem, placement, self._names())

    def choices(self) -> Iterator[tuple[str, ...]]:
        """Sets of devices to try, in the engine's order."""
        used, names = self._placement.devices, self._names()
        needed = {name for name in used if self._problem.traits[name].kind != "gpu"}
        if self._problem.options.tensor_split is not None or len(names) > _MOST_CHOSEN_FROM:
            yield from dict.fromkeys((used, names))
            return
        for number in range(len(names), 0, -1):
            yield from (chosen for chosen in combinations(names, number) if needed <= set(chosen))

    def pack(
        self, names: tuple[str, ...], taken: Mapping[str, int] | None = None
    ) -> tuple[float, Placement] | None:
        """The best packing on these devices and about how long its turn takes; None if nothing fits.

        `taken` are bytes to leave alone on each device.
        """
        shape, placement, problem = self._problem.shape, self._placement, self._problem
        ends = self._forced_ends(names)
        busy = names if ends is None else tuple(name for name, end in ends.items() if end is not None)
        needs = compute_needs(problem, placement, busy)
        whole = fixed_seconds(problem, placement, names, busy)
        lacking = Counter(self._lacking.get(names, {}))
        lacking.update(taken or {})
        shares = [
            DeviceShare(
                prices=self._prices[name],
                room=self._budgets[name] - lacking[name],
                need=needs[name],
                free=self._free,
                in_ram=self._in_ram,
                trunk=shape.n_layer,
                use_seconds=whole - fixed_seconds(problem, placement, names, _without(busy, name)),
            )
            for name in busy
        ]
        if ends is None:
            found = best_cut(shares, self._first)
        else:
            stops = [end for end in ends.values() if end is not None]
            starts = [self._first, *stops[:-1]]
            found = (
                stops,
                [
                    share.pack(*run)
                    for share, run in zip(shares, zip(starts, stops, strict=True), strict=True)
                ],
            )
        if found is None:
            return None
        stops, runs = found
        base = whole - sum(share.use_seconds for share in shares)
        return base + sum(run.seconds for run in runs), self._placement_of(names, stops, runs)

    def learn(self, checked: Placed) -> None:
        """Reckon with what a packing lacked that should have fitted."""
        lacking = self._lacking.setdefault(checked.placement.devices, {})
        for name, size in checked.missing.items():
            lacking[name] = lacking.get(name, 0) + size

    def _names(self) -> tuple[str, ...]:
        if self._problem.options.tensor_split is not None:
            return self._placement.devices
        kinds = {name: self._problem.traits[name].kind for name in self._problem.offload_devices()}
        used = self._placement.devices
        return tuple(name for name, kind in kinds.items() if kind == "gpu" or name in used)

    def _forced_ends(self, names: tuple[str, ...]) -> dict[str, int | None] | None:
        """Where the run of each device ends that a forced split gives any layers; None without one."""
        if self._problem.options.tensor_split is None:
            return None
        homes = layer_devices(self._problem.shape, self._placement, self._problem.used(self._placement))
        last = {name: layer + 1 for layer, name in enumerate(homes) if name != HOST}
        return {name: last.get(name) for name in names}

    def _placement_of(self, names: tuple[str, ...], stops: list[int], runs: list[Packed]) -> Placement:
        layers = set(self._stay) | self._in_ram
        for run in runs:
            layers |= set(run.in_ram)
        chosen = tuple(sorted(layers))
        rules = (Override(expert_pattern(chosen), HOST),) if chosen else ()
        split = self._placement.tensor_split
        if self._problem.options.tensor_split is None:
            starts = [self._first, *stops[:-1]]
            counts = tuple(float(stop - start) for start, stop in zip(starts, stops, strict=True))
            split = counts if len(counts) > 1 else None
        return replace(
            self._placement,
            devices=names,
            tensor_split=split,
            cpu_expert_layers=chosen,
            overrides=rules,
        )


def _without(names: tuple[str, ...], left_out: str) -> tuple[str, ...]:
    return tuple(name for name in names if name != left_out)
