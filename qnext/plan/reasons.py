"""Why a plan is as it is, in words with the numbers behind them: a reason for each thing that was decided."""

from __future__ import annotations

from dataclasses import replace

from qnext.models.shape import ModelShape, layer_of
from qnext.plan.choice import SLOTS_COST, SMALL_CACHE, SMALL_CACHE_GAIN
from qnext.plan.host_caches import HostCaches
from qnext.plan.layer_prices import NO_PIPELINE
from qnext.plan.options import DEFAULT_CONTEXT, GPU_UBATCHES
from qnext.plan.placement import Placed, Problem
from qnext.plan.turn import verifying_share
from qnext.plan.values import Placement, Reason
from qnext.units import format_bytes


def plan_reasons(problem: Problem, placed: Placed, caches: HostCaches) -> list[Reason]:
    """Every decision that the user left open, the placement first."""
    placement, options = placed.placement, problem.options
    reasons = [_placement_reason(problem, placed)]
    if options.context is None:
        reasons.append(_context_reason(problem, placed))
    if options.kv_type_k is None and options.kv_type_v is None:
        reasons += _cache_reasons(problem, placed)
    if options.parallel is None:
        reasons.append(_slots_reason(placed))
    if NO_PIPELINE in placement.overrides:
        reasons.append(
            Reason(
                "no pipeline between the GPUs",
                "llama.cpp would keep four copies of what it sends them, too much beside the weights; "
                f"an override that matches no tensor ({NO_PIPELINE.pattern}) turns that off",
            )
        )
    chosen = options.ubatch is None and placement.ubatch in GPU_UBATCHES
    if placement.cpu_expert_layers and placement.devices and chosen:
        reasons.append(
            Reason(
                what=f"ubatch {placement.ubatch}",
                because="experts in RAM are copied to the GPU once per ubatch of the prompt, and a larger "
                "ubatch takes the room of experts on the GPU: this one makes the turn shortest",
                numbers={
                    "largest_tried": GPU_UBATCHES[0],
                    "prompt": options.workload.prompt,
                    "generate": options.workload.generate,
                },
            )
        )
    if problem.may_repack(placement):
        reason = _REPACK_REASONS[options.repack]
        reasons.append(replace(reason, because="asked for with --repack") if options.repack_asked else reason)
    if problem.shape.n_layer_nextn and not placement.load_mtp and placed.fits:
        reasons.append(_heads_reason(problem, placed))
    if placed.fits:
        reasons.append(_host_caches_reason(caches))
    return reasons


def _context_reason(problem: Problem, placed: Placed) -> Reason:
    context, slots = placed.placement.context, placed.placement.parallel
    trained, turn = problem.shape.context_train, problem.options.workload.tokens
    because = "the usual default; the model was trained for more"
    if context // slots >= trained:
        because = "all the model was trained for"
    elif context < DEFAULT_CONTEXT:
        because = f"halved from {DEFAULT_CONTEXT:,} until it fitted"
    elif context > DEFAULT_CONTEXT and turn > DEFAULT_CONTEXT // slots:
        because = f"a turn of the workload needs {turn:,} tokens"
    if slots > 1:
        because += f"; {context // slots:,} for each of {slots} slots"
    return Reason(f"context {context}", because, {"trained": trained, "default": DEFAULT_CONTEXT})


def _cache_reasons(problem: Problem, placed: Placed) -> list[Reason]:
    """Only where the cache was rounded; f16 is what everybody expects."""
    if placed.placement.kv_type_k != SMALL_CACHE[0]:
        return []
    taken = sum(device.kv_bytes for device in placed.memory.devices)
    because = (
        "half the size of f16, nearly its precision: without it the context would be shorter, or a turn "
        f"{SMALL_CACHE_GAIN:.0%} longer or more; -ctk f16 -ctv f16 asks for the full one".replace("%", " %")
    )
    return [Reason(f"KV cache in {SMALL_CACHE[0]}", because, {"kv_bytes": taken})]


def _slots_reason(placed: Placed) -> Reason:
    slots = placed.placement.parallel
    each = sum(device.kv_bytes + device.recurrent_bytes for device in placed.memory.devices) // slots
    because = (
        f"each holds {placed.placement.context // slots:,} tokens, and together they add at most "
        f"{SLOTS_COST:.0%} to one user's turn"
        if slots > 1
        else "a second one would shorten the context or slow down the first"
    )
    return Reason(f"slots {slots}", because.replace("%", " %"), {"one_slot_bytes": each})


def _heads_reason(problem: Problem, placed: Placed) -> Reason:
    """The speculative heads of a file that has some: what they would take, and could bring at best."""
    shape = problem.shape
    size = sum(
        tensor.nbytes
        for tensor in problem.header.tensors
        if (layer := layer_of(tensor.name)) is not None and layer >= shape.n_layer
    )
    because = "the engine as qnext drives it does not draft tokens"
    numbers: dict[str, float | int | str] = {"heads_bytes": size}
    share = verifying_share(problem, placed)
    if share is not None:
        gain = 2 / share - 1
        numbers["two_tokens_over_one"] = round(share, 3)
        because += (
            f"; checking two tokens at once would take {share:.2f} times one here, each choosing its own "
            f"experts, so that a right guess every time would bring {max(0.0, gain):.0%}".replace("%", " %")
        )
    return Reason(f"speculative heads not loaded ({format_bytes(size)})", because, numbers)


def _host_caches_reason(caches: HostCaches) -> Reason:
    numbers: dict[str, float | int | str] = {"prompt_cache_bytes": caches.prompt_cache_bytes}
    because = "earlier prompts are kept in the RAM that the plan leaves, so that they are not read again"
    if caches.checkpoint_bytes:
        numbers |= {"checkpoints": caches.checkpoints, "checkpoint_bytes": caches.checkpoint_bytes}
        because += (
            f"; this model's memory cannot be rewound, so {caches.checkpoints} snapshots of "
            f"{format_bytes(caches.checkpoint_bytes)} are kept for each slot"
        )
    return Reason(f"prompt cache {format_bytes(caches.prompt_cache_bytes)}", because, numbers)


def layers_with_experts_in_ram(shape: ModelShape, placement: Placement) -> frozenset[int]:
    """The trunk's layers that leave their experts on the host, with or without the rest of them."""
    first = max(0, shape.n_layer_all + 1 - placement.n_gpu_layers) if placement.devices else shape.n_layer
    return frozenset((*range(min(first, shape.n_layer)), *placement.cpu_expert_layers))


def _placement_reason(problem: Problem, placed: Placed) -> Reason:
    shape, placement = problem.shape, placed.placement
    host, others = placed.memory.devices[0], placed.memory.devices[1:]
    left = {f"{one.name}_left_bytes": (one.budget_bytes or 0) - one.total_bytes for one in others}
    if not placement.devices:
        offered = problem.offload_devices()
        why = "there is no device with memory beside the host"
        if offered:
            why = f"{', '.join(offered)} cannot hold even one layer with its cache"
        if problem.options.n_gpu_layers == 0:
            why = "asked for with -ngl 0"
        return Reason("everything on the CPU", why, {"host_bytes": host.total_bytes})
    layers = min(placement.n_gpu_layers, shape.n_layer_all + 1)
    partly = layers <= shape.n_layer_all
    numbers: dict[str, float | int | str] = {"layers_on_gpu": layers, "layers": shape.n_layer, **left}
    if shape.dense:
        what = f"{layers - 1} of {shape.n_layer} layers on the GPU" if partly else "all layers on the GPU"
        return Reason(
            what,
            "a dense model has no experts to leave in RAM: every layer is read in full for every token, so "
            "whole layers move, the last ones first",
            numbers,
        )
    moved = len(layers_with_experts_in_ram(shape, placement))
    numbers["cpu_expert_layers"] = moved
    what = f"experts of {moved} of {shape.n_layer} layers on the CPU" if moved else "all experts on the GPU"
    if partly:
        because = "the GPU has no room for attention and cache of all layers"
        if problem.options.n_gpu_layers is not None:
            because = f"asked for with -ngl {problem.options.n_gpu_layers}"
        bare = " without them" if moved == shape.n_layer else ""
        return Reason(f"{what}, {layers - 1} layers{bare} on the GPU", because, numbers)
    if problem.options.cpu_experts is not None:
        asked = min(problem.options.cpu_experts, shape.n_layer)
        return Reason(what, f"asked for with -ncmoe {asked}", numbers)
    because = (
        "attention, cache and shared experts serve every token and go to the GPU first; experts follow while "
        "they fit, packed by their sizes so that the least time is lost to RAM"
    )
    if placement.cpu_expert_layers:
        following = min(shape.layer_bytes[layer].expert_bytes for layer in placement.cpu_expert_layers)
        numbers["next_layer_bytes"] = following
        room = format_bytes(max(0, *left.values()))
        where = " on one GPU at most" if len(left) > 1 else ""
        because += f"; the next layer's take {format_bytes(following)}, {room} are left{where}"
    return Reason(what, because, numbers)


_REPACK_REASONS = {
    "full": Reason("weights repacked by the engine", "wider SIMD kernels; no crash is known on this CPU"),
    "experts": Reason(
        "routed experts in CPU_REPACK, nothing in AMX buffers",
        "llama.cpp crashes with AMX buffers on such CPUs; this is the fastest layout that avoids them",
    ),
    "off": Reason("weights as they are in the file", "repacking is off"),
}
