"""The levels of the knobs that need no load: threads, batches, attention and cache, and their combinations.

Only levels that can matter: no ubatch beyond the prompt, no thread counts where everything is on devices, no
quantised cache without flash attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from qnext.bench.knob_model import Level
from qnext.pipeline.planning import PlannedModel
from qnext.pipeline.sweep_values import Grid, Objective
from qnext.plan.choice import cache_types
from qnext.plan.values import Placement

UBATCHES = (128, 256, 512, 1024, 2048, 4096)


class Levels:
    """What to try of each knob around a plan, the user's `grid` first. `all_on_devices`: the host waits."""

    def __init__(self, planned: PlannedModel, objective: Objective, grid: Grid, all_on_devices: bool) -> None:
        self._planned, self._objective, self._grid = planned, objective, grid
        self._problem, self._plan = planned.problem, planned.plan.placement
        self._all_on_devices = all_on_devices

    def contexts(self, base: Placement) -> Iterator[Placement]:
        """`base` with every combination of the knobs that need no load."""
        for threads, threads_batch, ubatch, batch, (flash, kv) in product(
            self.threads("threads", self._plan.threads),
            self.threads("threads_batch", self._plan.threads_batch),
            self.ubatches(),
            self.levels("batch", (self._plan.batch,), self._plan.batch),
            self.attention(),
        ):
            kv_k, _, kv_v = kv.partition("/")
            yield replace(
                base,
                threads=threads,
                threads_batch=threads_batch,
                ubatch=ubatch,
                batch=max(int(batch), ubatch),
                kv_type_k=kv_k,
                kv_type_v=kv_v or kv_k,
                flash_attention=flash,  # type: ignore[arg-type]
            )

    def levels(self, knob: str, usual: Sequence[Level], planned: Level) -> list[Level]:
        """Levels of a knob: those asked for; else the usual ones, or the planned one beside a grid."""
        asked: Sequence[Level] | None = getattr(self._grid, knob)
        if asked is not None:
            return list(dict.fromkeys(asked))
        return [planned] if self._grid.closed else list(dict.fromkeys((planned, *usual)))

    def threads(self, knob: str, planned: int) -> list[int]:
        cpu = self._planned.surroundings.machine.cpu
        cores = cpu.usable_cores or cpu.physical_cores or planned
        logical = cpu.usable_logical_cores or cpu.logical_cores or cores
        usual = [cores, logical, max(1, cores // 2)]
        if cpu.performance_cores and cpu.efficiency_cores:
            usual.append(min(cpu.performance_cores, cores))
        asked = self._planned.surroundings.threads
        if self._all_on_devices:
            usual = []
        elif planned not in (cores, logical) and asked == self._plan.threads:
            usual = [count for count in usual if count < planned]  # the user's own limit stands
        return [int(level) for level in self.levels(knob, usual, planned)]

    def ubatches(self) -> list[int]:
        """Up to the first that takes the whole prompt: from there on they do the same."""
        workload, plan = self._problem.options.workload, self._plan
        enough = next((size for size in UBATCHES if size >= workload.prompt), UBATCHES[-1])
        usual = [size for size in UBATCHES if size <= min(enough, plan.context)]
        if self._objective == "decode":
            usual = []
        return [int(level) for level in self.levels("ubatch", usual, plan.ubatch)]

    def attention(self) -> list[tuple[str, str]]:
        """(flash attention, cache type or K/V types) to try together."""
        plan, grid = self._plan, self._grid
        own = cache_word(plan)
        caches = [f"{k}/{v}" if k != v else k for k, v in cache_types(self._problem)]
        if self._problem.options.prefer == "quality":
            caches = [own]
        if grid.kv_type_k is not None or grid.kv_type_v is not None:
            keys = grid.kv_type_k or grid.kv_type_v or ()
            values = grid.kv_type_v or grid.kv_type_k or ()
            both = zip(keys, values, strict=True) if len(keys) == len(values) else product(keys, values)
            caches = [k if k == v else f"{k}/{v}" for k, v in both]
        elif grid.closed:
            caches = [own]
        elif own not in caches:
            caches.append(own)
        flashes = [
            str(level) for level in self.levels("flash_attention", ("on", "off"), plan.flash_attention)
        ]
        plain = {"f16", "f32", "bf16"}
        return [
            (flash, cache)
            for flash, cache in product(flashes, caches)
            if flash != "off" or (cache.partition("/")[2] or cache) in plain
        ]


def cache_word(placement: Placement) -> str:
    """The cache types as `q8_0`, or `q8_0/f16` where keys and values differ."""
    k, v = placement.kv_type_k, placement.kv_type_v
    return k if k == v else f"{k}/{v}"
