"""Rules of packing: what goes where on several devices is the fastest that fits, and what is forced stays."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.models.shape import is_expert, layer_of
from qnext.plan.cut import DeviceShare, best_cut
from qnext.plan.expert_rules import expert_pattern
from qnext.plan.layer_prices import NO_PIPELINE, ComputeNeed, LayerPrice
from qnext.plan.packing import pack_experts
from qnext.plan.placement import ALL_LAYERS, Placed, Problem, check_placement, find_placement
from qnext.plan.speed import MachineSpeeds
from qnext.plan.turn import placed_seconds
from qnext.plan.values import HOST, Override, Placement
from qnext.plan.weights import assign_buffers, layer_devices
from qnext.units import MIB
from tests.planning import DENSE, MIXTURES, problem

GB = 1_000_000_000
BASE = Placement(context=2048, ubatch=256, outputs_max=1)
UNEVEN = MachineSpeeds(
    50 * GB,
    "given",
    {"CUDA0": 400 * GB, "CUDA1": 900 * GB, "CUDA2": 1800 * GB},
    8,
    "avx2",
    {"CUDA0": 32 * GB, "CUDA1": 8 * GB, "CUDA2": 16 * GB},
)
SIZES = st.integers(9 * MIB, 22 * MIB)


def ask(name: str, gpus: dict[str, int], **options: object) -> Problem:
    return replace(problem(name, gpus, **options), speeds=UNEVEN)  # type: ignore[arg-type]


def packed(asked: Problem) -> Placed:
    return pack_experts(asked, find_placement(asked, BASE))


def with_experts_in_ram(placement: Placement, layers: tuple[int, ...]) -> Placement:
    rules = (Override(expert_pattern(layers), HOST),) if layers else ()
    return replace(placement, cpu_expert_layers=layers, overrides=rules)


@pytest.mark.parametrize("sizes", [(14, 10), (10, 15)])
@pytest.mark.parametrize("name", ["tiny-gpt-oss", "tiny-qwen3moe"])
def test_no_cut_and_no_set_of_layers_is_faster(name: str, sizes: tuple[int, int]) -> None:
    asked = ask(name, {f"CUDA{number}": size * MIB for number, size in enumerate(sizes)})
    chosen = packed(asked)
    best, layers = placed_seconds(asked, chosen), asked.shape.n_layer
    for count, bits in product(range(layers + 2), range(1 << layers)):
        counts = [(name, float(n)) for name, n in (("CUDA0", count), ("CUDA1", layers + 1 - count)) if n]
        placement = replace(
            chosen.placement,
            devices=tuple(name for name, _ in counts),
            tensor_split=tuple(n for _, n in counts) if len(counts) > 1 else None,
        )
        in_ram = tuple(layer for layer in range(layers) if bits >> layer & 1)
        other = check_placement(asked, with_experts_in_ram(placement, in_ram))
        if other.fits:
            best = min(best, placed_seconds(asked, other))
    assert placed_seconds(asked, chosen) <= best * 1.01


@settings(max_examples=15, deadline=None)
@given(st.sampled_from((*MIXTURES, DENSE)), st.lists(SIZES, min_size=1, max_size=3))
def test_packing_fits_is_never_slower_and_stays_when_packed_again(name: str, sizes: list[int]) -> None:
    asked = ask(name, {f"CUDA{number}": size for number, size in enumerate(sizes)})
    found = find_placement(asked, BASE)
    chosen = pack_experts(asked, found)
    assert chosen.fits == found.fits
    assert placed_seconds(asked, chosen) <= placed_seconds(asked, found)
    again = pack_experts(asked, chosen)
    assert placed_seconds(asked, again) == placed_seconds(asked, chosen)


# What llama.cpp's own fit found for two loopback devices, with the compute buffers of its dry run, and room
# for it: it cut after three layers and left the experts of the last four in RAM, where dealing the layers
# in order often left those of five there.
FIT_COMPUTE = {HOST: 4_462_656, "RPC0": 3_964_960, "RPC1": 4_756_512}


@pytest.mark.parametrize("sizes", [(11, 10.4), (12, 10.4), (13, 10.4), (13, 11)])
def test_llama_cpps_fit_does_not_do_better(sizes: tuple[float, float]) -> None:
    gpus = {f"RPC{number}": round(size * MIB) for number, size in enumerate(sizes)}
    asked = ask("tiny-qwen3next", gpus, compute=FIT_COMPUTE)
    fit = replace(
        BASE,
        devices=("RPC0", "RPC1"),
        rpc_servers=asked.rpc_servers,
        n_gpu_layers=ALL_LAYERS,
        tensor_split=(3.0, 6.0),
    )
    theirs = check_placement(asked, with_experts_in_ram(fit, (4, 5, 6, 7)))
    assert theirs.fits
    assert placed_seconds(asked, packed(asked)) < placed_seconds(asked, theirs)


def test_the_faster_gpu_holds_more_of_the_experts_whatever_its_place() -> None:
    for fast, slow in (("CUDA0", "CUDA1"), ("CUDA1", "CUDA0")):
        asked = replace(
            problem("tiny-qwen3next", {"CUDA0": 22 * MIB, "CUDA1": 22 * MIB}),
            speeds=replace(UNEVEN, device_bps={fast: 1800 * GB, slow: 60 * GB}),
        )
        chosen = packed(asked)
        on = dict.fromkeys((HOST, fast, slow), 0)
        used = asked.used(chosen.placement)
        for item in assign_buffers(asked.header, asked.shape, chosen.placement, asked.traits[HOST], used):
            if is_expert(item.tensor.name):
                on[item.buffer if item.buffer in on else HOST] += item.tensor.nbytes
        assert on[fast] > on[slow]


NOT_IN_PIPELINE = {HOST: 1_579_072, "RPC0": 5_018_656, "RPC1": 5_018_688}
"""Compute buffers of a dry run."""


@pytest.mark.parametrize(
    ("size", "compute", "rules"),
    [(22, None, ()), (16, None, (NO_PIPELINE,)), (16, NOT_IN_PIPELINE, (NO_PIPELINE,))],
)
def test_devices_do_without_their_pipeline_where_its_copies_have_no_room(
    size: int, compute: dict[str, int] | None, rules: tuple[Override, ...]
) -> None:
    asked = ask("tiny-qwen3next", {"RPC0": size * MIB, "RPC1": size * MIB}, compute=compute)
    placement = packed(asked).placement
    assert placement.cpu_expert_layers == ()
    assert placement.overrides == rules


def test_a_gpu_that_only_adds_a_crossing_is_left_out() -> None:
    asked = ask("tiny-qwen3next", {"CUDA0": 30 * MIB, "CUDA1": 100 * MIB})
    assert packed(asked).placement.devices == ("CUDA1",)


def test_a_network_device_that_was_named_is_used() -> None:
    asked = ask("tiny-qwen3next", {"RPC0": 20 * MIB, "RPC1": 16 * MIB})
    assert packed(asked).placement.devices == ("RPC0", "RPC1")


def test_a_forced_split_stays_and_the_layers_in_ram_are_chosen_within_it() -> None:
    gpus = {"CUDA0": 13 * MIB, "CUDA1": 15 * MIB}
    asked = ask("tiny-qwen3next", gpus, tensor_split=(1.0, 1.0))
    found, chosen = find_placement(asked, BASE), packed(asked)
    assert chosen.placement.tensor_split == (1.0, 1.0)
    assert placed_seconds(asked, chosen) < placed_seconds(asked, found)
    homes = layer_devices(asked.shape, chosen.placement, asked.used(chosen.placement))
    assert "CUDA0" in {homes[layer] for layer in chosen.placement.cpu_expert_layers}  # not only the tail


def test_forced_layers_stay_where_they_were_sent() -> None:
    gpus = {"CUDA0": 16 * MIB, "CUDA1": 16 * MIB}
    experts = packed(ask("tiny-qwen3next", gpus, cpu_experts=3)).placement
    assert experts.cpu_expert_layers == (0, 1, 2)
    partly = ask("tiny-qwen3next", gpus, n_gpu_layers=5)
    placed = packed(partly)
    homes = layer_devices(partly.shape, placed.placement, partly.used(placed.placement))
    assert placed.placement.n_gpu_layers == 5
    assert homes[:4] == (HOST,) * 4 and HOST not in homes[4:]
    rule = Override(r"blk\.0\.ffn_.*_exps", HOST)
    asked = ask("tiny-qwen3next", gpus, overrides=(rule,))
    assert packed(asked) == find_placement(asked, BASE)


def test_sparse_rules_name_exactly_the_layers_in_ram() -> None:
    asked = ask("tiny-qwen3next", {"CUDA0": 12 * MIB, "CUDA1": 11 * MIB})
    chosen = packed(asked)
    used = asked.used(chosen.placement)
    in_ram = {
        layer_of(item.tensor.name)
        for item in assign_buffers(asked.header, asked.shape, chosen.placement, asked.traits[HOST], used)
        if is_expert(item.tensor.name) and item.buffer not in {device.buffer_type for device in used}
    }
    assert in_ram == set(chosen.placement.cpu_expert_layers) != set()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 30)), min_size=2, max_size=6),
    st.tuples(st.integers(0, 90), st.integers(0, 90)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.booleans(),
)
def test_the_cut_found_is_the_best_of_all(
    layers: list[tuple[int, int]], rooms: tuple[int, int], worth: tuple[int, int], copies: bool
) -> None:
    """`layers` are (rest, expert) bytes; a device saves `worth` seconds for each byte of experts it holds."""
    shares = [
        DeviceShare(
            prices=[LayerPrice(rest, size, size // 3, 100.0, float(size * each)) for rest, size in layers],
            room=room,
            need=ComputeNeed(1, 2, 2, 1, copies),
            free=frozenset(range(len(layers))),
            in_ram=frozenset(),
            trunk=len(layers),
            use_seconds=0.0,
        )
        for room, each in zip(rooms, worth, strict=True)
    ]

    def seconds(number: int, start: int, end: int, bits: int) -> float:
        away = [layer for layer in range(start, end) if layers[layer][1] and bits >> layer & 1]
        taken = sum(sum(layers[layer]) for layer in range(start, end))
        taken -= sum(layers[layer][1] for layer in away)
        copied = max((layers[layer][1] // 3 for layer in away), default=0) if copies else 0
        if taken + copied + (2 if away else 1) > rooms[number]:
            return float("inf")
        return 100.0 * (end - start) + sum(layers[layer][1] * worth[number] for layer in away)

    number = len(layers)
    best = min(
        seconds(0, 0, cut, bits) + seconds(1, cut, number, bits)
        for cut in range(1, number)
        for bits in range(1 << number)
    )
    found = best_cut(shares, 0)
    if found is None:
        assert best == float("inf")
    else:
        assert sum(run.seconds for run in found[1]) <= best * 1.002
