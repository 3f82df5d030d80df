"""The chosen placement against every other: small models on one, two and three GPUs, all subsets of layers.

Several GPUs differ in size, bandwidth and link; every cut of the layers between them is tried, those that
leave a GPU out as well. Cache type and slots are given, so that only placements are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations_with_replacement, product
from typing import TYPE_CHECKING

from claims import Figure, claim

if TYPE_CHECKING:
    from qnext.plan.placement import Problem
    from qnext.plan.values import Placement

LIMIT = 1.01
MODELS = (("qwen3-next-80b-a3b", "Q4_K_M"), ("qwen3-30b-a3b", "Q4_K_M"), ("gpt-oss-20b", "MXFP4_MOE"))

Rates = tuple[int, int]
"""Bandwidth of a GPU and of its link to the host, GB/s."""

ONE: tuple[Rates, ...] = ((900, 32),)
ONE_SHARES = (0.25, 0.4, 0.55, 0.7, 0.85, 0.95)
TWO: tuple[tuple[Rates, ...], ...] = (((1800, 64), (450, 8)), ((450, 16), (900, 16)), ((300, 4), (900, 32)))
TWO_SHARES = ((0.08, 0.04), (0.35, 0.2), (0.2, 0.55), (0.45, 0.4))
THREE: tuple[tuple[Rates, ...], ...] = (
    ((1800, 64), (900, 16), (450, 8)),
    ((300, 4), (900, 32), (900, 16)),
)
THREE_SHARES = ((0.1, 0.06, 0.03), (0.3, 0.15, 0.2), (0.2, 0.45, 0.1))
SPLITS = {2: (1.0, 2.0), 3: (2.0, 1.0, 1.0)}
"""What `-ts` forces in one case of each kind more."""


@claim("placement-optimal", "turn time: chosen placement / best of all 256 x ubatches", bar="at most 1.01")
def measure_optimality() -> Figure:
    cases = product(MODELS, ONE_SHARES)
    return _worst(_ratio(problem(model, 8, (share,), ONE)) for model, share in cases)


@claim(
    "placement-optimal-two",
    "turn time on 2 and 3 GPUs: chosen placement / best of all subsets x cuts x ubatches",
    bar="at most 1.01",
    minutes=2,
)
def measure_optimality_of_several() -> Figure:
    return _worst(_several())


def _several() -> Iterator[float]:
    for kinds, all_shares, layers in ((TWO, TWO_SHARES, 6), (THREE, THREE_SHARES, 5)):
        for model, rates, shares in product(MODELS, kinds, all_shares):
            yield _ratio(problem(model, layers, shares, rates))
        for model, shares in product(MODELS, all_shares):
            yield _ratio(problem(model, layers, shares, kinds[0], SPLITS[len(shares)]))


def _worst(ratios: Iterator[float]) -> Figure:
    known = list(ratios)
    best = sum(ratio <= 1 for ratio in known)
    detail = f"worst of {len(known)} cases, {best} of them the best there is; same speed model for both"
    return Figure(max(known), "x", max(known) <= LIMIT, detail)


def problem(
    model: tuple[str, str],
    layers: int,
    shares: Sequence[float],
    rates: Sequence[Rates],
    tensor_split: tuple[float, ...] | None = None,
) -> Problem:
    """The first layers of a model on GPUs that each hold 600 MiB and a share of its file."""
    from qnext.models.shape import read_shape
    from qnext.models.synth.imagined import imagined_header
    from qnext.plan.options import PlanOptions
    from qnext.plan.placement import Problem
    from qnext.plan.speed import MachineSpeeds
    from qnext.plan.traits import device_traits, host_traits
    from qnext.plan.values import HOST, Budget
    from qnext.units import GIB, MIB

    header = imagined_header(*model, layers)
    names = [f"CUDA{number}" for number in range(len(shares))]
    gpus = [
        Budget(name, "gpu", round(header.file_bytes * share) + 600 * MIB, name)
        for name, share in zip(names, shares, strict=True)
    ]
    own, links = (
        {name: rate[side] * 1_000_000_000 for name, rate in zip(names, rates, strict=True)} for side in (0, 1)
    )
    options = PlanOptions(
        threads=8,
        threads_batch=16,
        context=32_768,
        parallel=1,
        kv_type_k="f16",
        kv_type_v="f16",
        tensor_split=tensor_split,
    )
    return Problem(
        header,
        read_shape(header),
        (Budget(HOST, "host", 64 * GIB, HOST), *gpus),
        {
            HOST: host_traits(("avx2",)),
            **{gpu.name: device_traits(gpu, free_bytes=gpu.budget_bytes) for gpu in gpus},
        },
        options,
        speeds=MachineSpeeds(60_000_000_000, "given", own, 8, "avx2", links),
    )


def _ratio(problem: Problem) -> float:
    """Seconds of a turn with the chosen placement over those of the fastest that fits."""
    from qnext.plan.choice import choose_placement
    from qnext.plan.placement import check_placement
    from qnext.plan.turn import placed_seconds

    chosen = choose_placement(problem)
    seconds = best = placed_seconds(problem, chosen)
    for placement in _placements(problem, chosen.placement):
        candidate = check_placement(problem, placement)
        if candidate.fits:
            best = min(best, placed_seconds(problem, candidate))
    return seconds / best


def _placements(problem: Problem, base: Placement) -> Iterator[Placement]:
    """All ubatches, cuts and sets of layers with their experts in RAM."""
    from qnext.plan.expert_rules import expert_pattern
    from qnext.plan.options import GPU_UBATCHES
    from qnext.plan.placement import ALL_LAYERS
    from qnext.plan.values import HOST, Override

    layers, names = problem.shape.n_layer, problem.offload_devices()
    forced = problem.options.tensor_split
    cuts: list[tuple[tuple[str, ...], tuple[float, ...] | None]] = [(names, forced)]
    if forced is None:
        cuts = []
        for edges in combinations_with_replacement(range(layers + 2), len(names) - 1):
            counts = [stop - start for start, stop in zip((0, *edges), (*edges, layers + 1), strict=True)]
            used = [(name, float(count)) for name, count in zip(names, counts, strict=True) if count]
            split = tuple(count for _, count in used) if len(used) > 1 else None
            cuts.append((tuple(name for name, _ in used), split))
    for ubatch, (devices, split), chosen_bits in product(GPU_UBATCHES, cuts, range(1 << layers)):
        in_ram = tuple(layer for layer in range(layers) if chosen_bits >> layer & 1)
        yield replace(
            base,
            devices=devices,
            tensor_split=split,
            n_gpu_layers=ALL_LAYERS,
            ubatch=ubatch,
            cpu_expert_layers=in_ram,
            overrides=(Override(expert_pattern(in_ram), HOST),) if in_ram else (),
        )
