"""The chosen placement against every other: 8-layer models, one GPU of six sizes, all subsets of layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from claims import Figure, claim

LIMIT = 1.01
MODELS = (("qwen3-next-80b-a3b", "Q4_K_M"), ("qwen3-30b-a3b", "Q4_K_M"), ("gpt-oss-20b", "MXFP4_MOE"))
SHARES = (0.25, 0.4, 0.55, 0.7, 0.85, 0.95)
LAYERS = 8


@claim("placement-optimal", "turn time: chosen placement / best of all 256 x ubatches", bar="at most 1.01")
def measure_optimality() -> Figure:
    ratios = list(_ratios())
    best = sum(ratio <= 1 for ratio in ratios)
    detail = f"worst of {len(ratios)} cases, {best} of them the best there is; same speed model for both"
    return Figure(max(ratios), "x", max(ratios) <= LIMIT, detail)


def _ratios() -> Iterator[float]:
    from qnext.models.shape import read_shape
    from qnext.models.synth.imagined import imagined_header
    from qnext.plan.choice import choose_placement
    from qnext.plan.flags import expert_pattern
    from qnext.plan.options import GPU_UBATCHES, PlanOptions
    from qnext.plan.placement import Problem, check_placement
    from qnext.plan.speed import MachineSpeeds
    from qnext.plan.traits import device_traits, host_traits
    from qnext.plan.turn import placed_seconds
    from qnext.plan.values import HOST, Budget, Override
    from qnext.units import GIB, MIB

    speeds = MachineSpeeds(
        60_000_000_000, "given", {"CUDA0": 900_000_000_000}, 8, "avx2", {"CUDA0": 32_000_000_000}
    )
    for name, quant in MODELS:
        header = imagined_header(name, quant, LAYERS)
        shape = read_shape(header)
        for share in SHARES:
            vram = round(header.file_bytes * share) + 600 * MIB
            budgets = (Budget(HOST, "host", 64 * GIB, HOST), Budget("CUDA0", "gpu", vram, "CUDA0"))
            traits = {HOST: host_traits(("avx2",)), "CUDA0": device_traits(budgets[1], free_bytes=vram)}
            options = PlanOptions(threads=8, threads_batch=16, context=32_768)
            problem = Problem(header, shape, budgets, traits, options, speeds=speeds)
            chosen = choose_placement(problem)
            best = placed_seconds(problem, chosen)
            for ubatch in GPU_UBATCHES:
                for chosen_bits in range(1 << LAYERS):
                    layers = tuple(layer for layer in range(LAYERS) if chosen_bits >> layer & 1)
                    rules = (Override(expert_pattern(layers), HOST),) if layers else ()
                    forced = replace(
                        chosen.placement, ubatch=ubatch, cpu_expert_layers=layers, overrides=rules
                    )
                    candidate = check_placement(problem, forced)
                    if candidate.fits:
                        best = min(best, placed_seconds(problem, candidate))
            yield placed_seconds(problem, chosen) / best
