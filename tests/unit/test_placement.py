"""Rules of the placement search, on real headers of tiny models."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qnext.errors import UsageError
from qnext.models.shape import is_expert, layer_of
from qnext.plan.choice import choose_placement
from qnext.plan.placement import ALL_LAYERS, Placed, Problem, check_placement, find_placement
from qnext.plan.traits import extra_buffer_accepts
from qnext.plan.values import CPU_REPACK, HOST, Override, Placement
from qnext.plan.weights import assign_buffers, layer_devices
from qnext.units import GIB, KIB, MIB
from tests.planning import DENSE, MIXTURES, model, problem

BASE = Placement(context=4096, ubatch=256, outputs_max=1)
NAMES = st.sampled_from((*MIXTURES, DENSE))
SIZES = st.integers(0, 36 * MIB)
fast = settings(max_examples=30, deadline=None)


def search(asked: Problem, base: Placement = BASE) -> Placed:
    return find_placement(asked, base)


def on_devices(asked: Problem, placed: Placed) -> dict[str, int]:
    """Bytes of routed experts on each device."""
    totals: dict[str, int] = {}
    used = asked.used(placed.placement)
    owner = {device.buffer_type: device.name for device in used}
    for item in assign_buffers(asked.header, asked.shape, placed.placement, asked.traits[HOST], used):
        if is_expert(item.tensor.name):
            name = owner.get(item.buffer, HOST)
            totals[name] = totals.get(name, 0) + item.tensor.nbytes
    return totals


def gpu_experts(asked: Problem, placed: Placed) -> int:
    return sum(size for name, size in on_devices(asked, placed).items() if name != HOST)


@fast
@given(NAMES, st.lists(SIZES, max_size=3), st.integers(1 * MIB, 60 * MIB), st.sampled_from([1, 4]))
def test_no_device_exceeds_its_budget_when_it_fits_and_what_is_missing_is_said(
    name: str, sizes: list[int], host: int, parallel: int
) -> None:
    asked = problem(name, {f"CUDA{i}": size for i, size in enumerate(sizes)}, host=host, parallel=parallel)
    placed = search(asked, replace(BASE, parallel=parallel, outputs_max=parallel))
    over = {
        device.name: device.total_bytes - (device.budget_bytes or 0)
        for device in placed.memory.devices
        if device.total_bytes > (device.budget_bytes or 0)
    }
    assert placed.missing == over
    assert placed.fits == (not over)


@fast
@given(NAMES, st.lists(SIZES, min_size=1, max_size=3))
def test_weights_of_all_devices_are_the_tensors_of_the_file(name: str, sizes: list[int]) -> None:
    asked = problem(name, {f"RPC{i}": size for i, size in enumerate(sizes)})
    placed = search(asked)
    loaded = [t for t in asked.header.tensors if (layer_of(t.name) or 0) < asked.shape.n_layer]
    tied = all(tensor.name != "output.weight" for tensor in loaded)
    embedding = next(tensor.nbytes for tensor in loaded if tensor.name == "token_embd.weight")
    planned = sum(device.weights_bytes for device in placed.memory.devices)
    copies = embedding if tied and placed.placement.devices else 0
    assert planned - sum(tensor.nbytes for tensor in loaded) - copies in range(32 * len(loaded))


@fast
@given(st.sampled_from(MIXTURES), SIZES, st.integers(0, 8 * MIB), st.integers(0, 12 * MIB))
def test_more_vram_never_places_fewer_experts_on_gpus(name: str, one: int, more: int, two: int) -> None:
    less, rich = (
        problem(name, {"CUDA0": one, "CUDA1": two}),
        problem(name, {"CUDA0": one + more, "CUDA1": two}),
    )
    assert gpu_experts(rich, search(rich)) >= gpu_experts(less, search(less))


@fast
@given(NAMES, st.lists(SIZES, max_size=2))
def test_same_inputs_same_placement(name: str, sizes: list[int]) -> None:
    def ask() -> Placed:
        return search(problem(name, {f"CUDA{i}": size for i, size in enumerate(sizes)}))

    assert ask() == ask()


@fast
@given(NAMES, st.integers(0, 80 * MIB), st.integers(30 * MIB, 160 * MIB), st.integers(1, 15))
def test_what_fits_at_a_context_fits_at_any_smaller_one(name: str, gpu: int, host: int, smaller: int) -> None:
    asked = problem(name, {"CUDA0": gpu}, host=host)
    assume(search(asked, replace(BASE, context=16_384)).fits)
    assert search(asked, replace(BASE, context=smaller * 1024)).fits


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("devices", [("CUDA0",), ("RPC0",)])
def test_one_device_takes_as_many_expert_layers_as_an_exhaustive_search_finds(
    name: str, devices: tuple[str, ...]
) -> None:
    layers = model(name)[1].n_layer
    totals = []
    roomy = problem(name, dict.fromkeys(devices, GIB))
    for moved in range(layers + 1):
        forced = replace(roomy, options=replace(roomy.options, overrides=(_tail_rule(layers, moved),)))
        totals.append(search(forced).memory.devices[1].total_bytes)
    for budget in {total + edge for total in totals for edge in (-1, 0, 1)}:
        best = min((moved for moved in range(layers + 1) if totals[moved] <= budget), default=None)
        placed = search(problem(name, dict.fromkeys(devices, budget)))
        if best is not None:
            assert len(placed.placement.cpu_expert_layers) == best, budget
        else:
            assert placed.placement.n_gpu_layers < ALL_LAYERS


def _tail_rule(layers: int, moved: int) -> Override:
    tail = "|".join(map(str, range(layers - moved, layers))) or "none"
    return Override(rf"blk\.({tail})\.ffn_.*_exps", HOST)


def test_head_of_the_model_is_on_the_gpu_and_the_tail_on_the_cpu() -> None:
    placed = search(problem(gpus={"CUDA0": 20 * MIB}))
    moved = placed.placement.cpu_expert_layers
    assert 0 < len(moved) < 8
    assert moved == tuple(range(8 - len(moved), 8))


def test_small_gpu_holds_attention_of_some_layers_and_no_experts() -> None:
    asked = problem(gpus={"CUDA0": 11 * MIB})
    placed = search(asked)
    assert placed.fits
    assert 0 < placed.placement.n_gpu_layers <= 8
    assert gpu_experts(asked, placed) == 0


def test_gpu_without_room_for_a_layer_is_left_alone() -> None:
    placed = search(problem(gpus={"CUDA0": 200 * KIB}))
    assert placed.placement.devices == ()
    assert placed.placement.n_gpu_layers == 0


def test_host_over_its_budget_still_uses_the_gpu_to_the_full() -> None:
    gpus = {"CUDA0": 20 * MIB}
    rich, poor = problem(gpus=gpus), problem(gpus=gpus, host=2 * MIB)
    placed = search(poor)
    assert placed.placement == search(rich).placement
    assert set(placed.missing) == {HOST}


@fast
@given(st.sampled_from(MIXTURES), *[st.integers(9 * MIB, 18 * MIB)] * 3)
def test_layers_are_dealt_in_order_and_the_output_goes_last(
    name: str, one: int, two: int, three: int
) -> None:
    asked = problem(name, {"CUDA0": one, "CUDA1": two, "CUDA2": three})
    placement = search(asked).placement
    assume(len(placement.devices) > 1)
    runs = [d for d in layer_devices(asked.shape, placement, asked.used(placement)) if d != HOST]
    assert [name for i, name in enumerate(runs) if i == 0 or runs[i - 1] != name] == list(placement.devices)
    assert placement.tensor_split is not None
    assert [runs.count(name) for name in placement.devices] == list(placement.tensor_split)


def test_two_small_gpus_hold_what_one_large_one_does() -> None:
    whole = search(problem(gpus={"CUDA0": GIB})).memory.devices[1]
    # Two that hold everything work in a pipeline, with three more copies each of what they are sent.
    halves = problem(gpus=dict.fromkeys(("CUDA0", "CUDA1"), whole.total_bytes * 9 // 10))
    placed = search(halves)
    assert placed.fits
    assert placed.placement.cpu_expert_layers == ()
    assert len(placed.placement.devices) == 2


def test_cpu_expert_layers_keep_their_attention_on_the_last_gpu() -> None:
    asked = problem(gpus={"CUDA0": 14 * MIB, "CUDA1": 14 * MIB})
    placed = search(asked)
    assert placed.fits
    moved = placed.placement.cpu_expert_layers
    assert moved
    devices = layer_devices(asked.shape, placed.placement, asked.used(placed.placement))
    assert {devices[layer] for layer in moved} == {"CUDA1"}


def test_dense_model_moves_whole_layers_the_last_first() -> None:
    asked = problem(DENSE, {"CUDA0": 10 * MIB})
    placed = search(asked)
    assert placed.fits
    layers = layer_devices(asked.shape, placed.placement, asked.used(placed.placement))
    moved = placed.placement.n_gpu_layers
    assert 1 < moved < 7
    assert layers == (HOST,) * (7 - moved) + ("CUDA0",) * moved
    assert placed.placement.cpu_expert_layers == placed.placement.overrides == ()


def test_gpu_layers_count_the_output_layer_and_mtp_blocks() -> None:
    for name, blocks in (("tiny-qwen3next", 8), ("tiny-qwen3next-mtp", 9)):
        for layers, where in ((blocks, HOST), (blocks + 1, "CUDA0")):
            asked = problem(name, {"CUDA0": GIB}, n_gpu_layers=layers)
            devices = layer_devices(asked.shape, search(asked).placement, [asked.traits["CUDA0"]])
            assert devices[0] == where
            assert devices[-1] == "CUDA0"


def test_forced_gpu_layers_stay_and_experts_are_sought_around_them() -> None:
    placed = search(problem(gpus={"CUDA0": 15 * MIB}, n_gpu_layers=5))
    assert placed.placement.n_gpu_layers == 5
    assert placed.fits
    assert placed.placement.cpu_expert_layers
    assert search(problem(DENSE, {"CUDA0": MIB}, n_gpu_layers=5)).placement.n_gpu_layers == 5


def test_forced_cpu_experts_are_those_of_the_first_layers() -> None:
    placed = search(problem(gpus={"CUDA0": GIB}, cpu_experts=3))
    assert placed.placement.cpu_expert_layers == (0, 1, 2)
    assert search(problem(gpus={"CUDA0": GIB}, cpu_experts=10_000)).placement.cpu_expert_layers == tuple(
        range(8)
    )


def test_forced_split_is_kept() -> None:
    gpus = {"CUDA0": 18 * MIB, "CUDA1": 24 * MIB}
    placed = search(problem(gpus=gpus, tensor_split=(1.0, 3.0)))
    assert placed.placement.tensor_split == (1.0, 3.0)
    assert placed.fits


def test_forced_overrides_come_first_and_experts_are_sought_around_them() -> None:
    rule = Override(r"blk\.0\.ffn_.*_exps", HOST)
    placed = search(problem(gpus={"CUDA0": 20 * MIB}, overrides=(rule,)))
    assert placed.fits
    assert placed.placement.overrides[0] == rule
    assert len(placed.placement.overrides) == 2
    roomy = search(problem(gpus={"CUDA0": GIB}, overrides=(rule,)))
    assert roomy.placement.overrides == (rule,)


def test_device_name_stands_for_its_buffer_type() -> None:
    placed = search(problem(gpus={"RPC0": GIB}, overrides=(Override("output", "RPC0"),)))
    assert placed.placement.overrides == (Override("output", "RPC0[127.0.0.1:50052]"),)


@pytest.mark.parametrize(
    ("rule", "word"),
    [
        (Override("exps", "CUDA7"), "no buffer type 'CUDA7'"),
        (Override("attn_norm", CPU_REPACK), "cannot be repacked"),
        (Override("ex(ps", CPU_REPACK), "not a regular expression"),
    ],
)
def test_override_that_would_fail_later_is_refused_now(rule: Override, word: str) -> None:
    for gpus in ({}, {"CUDA0": GIB}):
        with pytest.raises(UsageError, match=re.escape(word)):
            search(problem(gpus=gpus, overrides=(rule,)))


@pytest.mark.parametrize("name", MIXTURES)
def test_repack_overrides_name_only_what_the_repack_accepts(name: str) -> None:
    asked = problem(name, repack="experts")
    placed = search(asked)
    repacked = [
        item.tensor
        for item in assign_buffers(asked.header, asked.shape, placed.placement, asked.traits[HOST], [])
        if item.buffer == CPU_REPACK
    ]
    accepted = [
        tensor
        for tensor in asked.header.tensors
        if is_expert(tensor.name)
        and (layer_of(tensor.name) or 0) < asked.shape.n_layer
        and not tensor.name.endswith(".bias")
        and extra_buffer_accepts(CPU_REPACK, tensor, True, asked.traits[HOST].features)
    ]
    assert repacked == accepted
    assert repacked or name == "tiny-gpt-oss"


def test_own_overrides_of_a_cpu_plan_go_before_the_repack() -> None:
    rule = Override(r"blk\.0\.", HOST)
    placed = search(problem(repack="experts", overrides=(rule,)))
    assert placed.placement.overrides[0] == rule
    assert len(placed.placement.overrides) > 1


def test_beside_rpc_devices_alone_the_cpus_weights_are_repacked() -> None:
    full, experts, off = (
        search(problem("tiny-qwen3moe", {"RPC0": 24 * MIB}, repack=layout)).placement
        for layout in ("full", "experts", "off")
    )
    assert 0 < len(full.cpu_expert_layers) < 6
    assert (full.extra_buffers, experts.extra_buffers, off.extra_buffers) == (True, False, False)
    assert [rule.buffer for rule in experts.overrides][-2:] == [CPU_REPACK, HOST]
    assert off.overrides == full.overrides == experts.overrides[-1:]
    with_gpu = search(
        problem("tiny-qwen3moe", {"RPC0": 12 * MIB, "CUDA0": 12 * MIB}, repack="full")
    ).placement
    assert not with_gpu.extra_buffers


def test_expert_biases_go_where_their_weights_go() -> None:
    asked = problem("tiny-gpt-oss", {"CUDA0": 18 * MIB})
    placed = search(asked)
    assert 0 < len(placed.placement.cpu_expert_layers) < 6
    where: dict[int, set[str]] = {}
    for item in assign_buffers(
        asked.header, asked.shape, placed.placement, asked.traits[HOST], asked.used(placed.placement)
    ):
        if is_expert(item.tensor.name):
            where.setdefault(layer_of(item.tensor.name) or 0, set()).add(item.buffer)
    assert all(len(buffers) == 1 for buffers in where.values())
    assert any(t.name.endswith("exps.bias") for t in asked.header.tensors)


def test_ubatch_shrinks_before_the_context_and_a_wish_is_kept() -> None:
    def chosen(host: int, **wishes: object) -> tuple[int, int]:
        placed = choose_placement(problem(gpus={"CUDA0": 100 * KIB}, host=host, **wishes))
        return placed.placement.context, placed.placement.ubatch

    seen = {chosen(size * MIB // 2) for size in range(30, 560, 10)}
    assert (32_768, 2048) in seen
    assert (32_768, 512) in seen
    assert not {one for one in seen if one[0] < 32_768 and one[1] == 2048 and (32_768, 512) not in seen}
    assert chosen(2 * MIB) == (4096, 512)
    assert chosen(2 * MIB, context=8192, ubatch=1024) == (8192, 1024)


def test_mapped_file_and_repacked_copies_count_twice() -> None:
    asked = problem(repack="full")
    read = check_placement(asked, replace(BASE, extra_buffers=True))
    mapped = check_placement(asked, replace(BASE, extra_buffers=True, load_mode="mmap"))
    repacked = mapped.memory.buffers[CPU_REPACK]
    assert repacked > 0
    surplus = mapped.memory.devices[0].weights_bytes - read.memory.devices[0].weights_bytes
    assert surplus in range(repacked - 64 * KIB, repacked + 64 * KIB)
    assert any("twice" in reason.what for reason in mapped.memory.reasons)
