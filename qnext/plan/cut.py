"""Cuts layers into one run per device and picks the experts that stay there, so that the time adds up least.

Layers keep their order, as llama.cpp deals them, so a device holds a run of them. What a run takes on its
device is exact arithmetic: all but the experts must be there; of the experts as many as fit, those that save
most per byte, tried by branch and bound over the few kinds there are. The best cut is a shortest path over
runs. Most runs never need the exact answer: a path is first sought with what each run could save at best,
and only the runs of the path found are worked out, until one stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import inf

from qnext.plan.layer_prices import ComputeNeed, LayerPrice

_TOLERANCE = 0.0005
"""Part of the time by which an answer may miss the best there is."""
_ROUNDS = 100


@dataclass(frozen=True, slots=True)
class Packed:
    """A run of layers on one device: its seconds, infinite if it does not fit; experts left in RAM."""

    seconds: float
    in_ram: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Kind:
    """Layers whose experts are alike, in order, with how many there are before each position."""

    size: int
    saved: float
    copied: int
    layers: list[int]
    before: list[int]


@dataclass(slots=True)
class DeviceShare:
    """One device with its room (bytes) and the prices of all layers on it.

    The experts of `free` layers may be left in RAM, those of `in_ram` have to be. `use_seconds` is what it
    costs that the device takes part at all, with any of the first `trunk` layers.
    """

    prices: Sequence[LayerPrice]
    room: int
    need: ComputeNeed
    free: frozenset[int]
    in_ram: frozenset[int]
    trunk: int
    use_seconds: float
    _rest: list[int] = field(init=False)
    _seconds: list[float] = field(init=False)
    _kinds: list[_Kind] = field(init=False)
    _least: int = field(init=False)
    _density: float = field(init=False)

    def __post_init__(self) -> None:
        rest, seconds = [0], [0.0]
        by_kind: dict[tuple[int, float, int], list[int]] = {}
        for layer, price in enumerate(self.prices):
            away = layer in self.free or layer in self.in_ram
            rest.append(price.rest_bytes + (0 if away else price.expert_bytes))
            seconds.append(price.seconds + (price.saved if away else 0.0))
            if layer in self.free and price.expert_bytes:
                key = (price.expert_bytes, price.saved, price.copied_bytes)
                by_kind.setdefault(key, []).append(layer)
        self._rest, self._seconds = list(accumulate(rest)), list(accumulate(seconds))
        self._kinds = []
        for (size, saved, copied), layers in by_kind.items():
            marks = set(layers)
            before = list(accumulate((layer in marks for layer in range(len(self.prices))), initial=0))
            self._kinds.append(_Kind(size, saved, copied, layers, before))
        self._kinds.sort(key=lambda kind: (-kind.saved / kind.size, kind.layers))
        self._density = max((kind.saved / kind.size for kind in self._kinds), default=0.0)
        self._least = min(self.need.all, self.need.some, self.need.none, self.need.output)

    def bound(self, start: int, end: int) -> float:
        """Seconds that layers `start` to `end` (excluded) take here at least; infinite if they do not fit."""
        room = self.room - self._least - (self._rest[end] - self._rest[start])
        if room < 0:
            return inf
        saved = sum(kind.saved * (kind.before[end] - kind.before[start]) for kind in self._kinds)
        return self._all_in_ram(start, end) - max(0.0, min(saved, room * self._density))

    def pack(self, start: int, end: int) -> Packed:
        """The best of these layers here: as many of their experts as fit, the rest of them in RAM."""
        room = self.room - (self._rest[end] - self._rest[start])
        seconds = self._all_in_ram(start, end)
        if start >= self.trunk:
            return Packed(seconds if room >= self.need.output else inf)
        kinds = [kind for kind in self._kinds if kind.before[end] > kind.before[start]]
        counts = [kind.before[end] - kind.before[start] for kind in kinds]
        forced = [self.prices[layer].copied_bytes for layer in range(start, end) if layer in self.in_ram]
        size = sum(kind.size * count for kind, count in zip(kinds, counts, strict=True))
        if not forced and size <= room - self.need.all:
            return Packed(seconds - sum(k.saved * n for k, n in zip(kinds, counts, strict=True)))
        best, kept = -inf, [0] * len(kinds)
        copied = self._copied((*forced, *(kind.copied for kind in kinds)))
        if room - self.need.none - max(copied) >= 0:
            best = 0.0
        for most in copied:
            if forced and self.need.copies and most < max(forced):
                continue
            must = [count if kind.copied > most else 0 for kind, count in zip(kinds, counts, strict=True)]
            if not self.need.copies:
                must = [0] * len(kinds)
            left = room - self.need.some - most
            left -= sum(kind.size * count for kind, count in zip(kinds, must, strict=True))
            if left < 0:
                continue
            more = [count - taken for count, taken in zip(counts, must, strict=True)]
            extra = _fill([(k.size, k.saved, count) for k, count in zip(kinds, more, strict=True)], left)
            here = [taken + count for taken, count in zip(must, extra, strict=True)]
            saved = sum(kind.saved * count for kind, count in zip(kinds, here, strict=True))
            if saved > best:
                best, kept = saved, here
        if best == -inf:
            return Packed(inf)
        in_ram: list[int] = []
        for kind, count in zip(kinds, kept, strict=True):
            in_ram += kind.layers[kind.before[start] + count : kind.before[end]]
        return Packed(seconds - best, tuple(sorted(in_ram)))

    def _all_in_ram(self, start: int, end: int) -> float:
        """Seconds of these layers with the experts of all free ones in RAM."""
        seconds = self._seconds[end] - self._seconds[start]
        return seconds + self.use_seconds if start < self.trunk else seconds

    def _copied(self, sizes: Sequence[int]) -> list[int]:
        return sorted(set(sizes)) if self.need.copies and sizes else [0]


def best_cut(shares: Sequence[DeviceShare], first: int) -> tuple[list[int], list[Packed]] | None:
    """Where each device's run ends, and what it holds, for the layers from `first` on; None if none fits.

    Every device gets a layer at least, the last one the output layer.
    """
    end, last = len(shares[0].prices), len(shares) - 1
    cost = [
        {
            (start, stop): share.bound(start, stop)
            for start in ([first] if number == 0 else range(first + number, end))
            for stop in ([end] if number == last else range(start + 1, end))
        }
        for number, share in enumerate(shares)
    ]
    exact: dict[tuple[int, int, int], Packed] = {}
    best, found = inf, None
    for _ in range(_ROUNDS):
        least, ends = _shortest(cost, first, end)
        if least == inf or best <= least * (1 + _TOLERANCE):
            break
        starts = [first, *ends[:-1]]
        for number, run in enumerate(zip(starts, ends, strict=True)):
            if (number, *run) not in exact:
                exact[number, *run] = packed = shares[number].pack(*run)
                cost[number][run] = packed.seconds
        path = [exact[number, *run] for number, run in enumerate(zip(starts, ends, strict=True))]
        seconds = sum(packed.seconds for packed in path)
        if seconds < best:
            best, found = seconds, (ends, path)
    return found


def _shortest(cost: Sequence[dict[tuple[int, int], float]], first: int, end: int) -> tuple[float, list[int]]:
    """The least sum of one run for each device, end to end, and where each run ends."""
    reached: dict[int, tuple[float, list[int]]] = {first: (0.0, [])}
    for runs in cost:
        farther: dict[int, tuple[float, list[int]]] = {}
        for (start, stop), seconds in runs.items():
            if start not in reached or seconds == inf:
                continue
            so_far, ends = reached[start]
            if stop not in farther or so_far + seconds < farther[stop][0]:
                farther[stop] = (so_far + seconds, [*ends, stop])
        reached = farther
    return reached.get(end, (inf, []))


def _fill(items: Sequence[tuple[int, float, int]], room: int) -> list[int]:
    """How many of each (size, worth, number), densest first, make the most worth in `room`, nearly."""
    best, chosen = 0.0, [0] * len(items)
    counts = [0] * len(items)

    def descend(position: int, left: int, worth: float) -> None:
        nonlocal best, chosen
        if worth > best:
            best, chosen = worth, counts.copy()
        if position == len(items):
            return
        size, each, number = items[position]
        following = items[position + 1][1] / items[position + 1][0] if position + 1 < len(items) else 0.0
        for count in range(min(number, left // size), -1, -1):
            if worth + count * each + (left - count * size) * max(0.0, following) <= best * (1 + _TOLERANCE):
                break
            counts[position] = count
            descend(position + 1, left - count * size, worth + count * each)
        counts[position] = 0

    descend(0, room, 0.0)
    return chosen
