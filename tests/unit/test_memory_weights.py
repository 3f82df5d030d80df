"""Every weight lands in the buffer that llama.cpp puts it in, and buffers are as large as it makes them.

Figures marked "log" are "model buffer size" lines of llama.cpp 0.5.0 (llama-cpp-python 0.3.36) for the same
synthetic files, read with scripts/bench_memory_exact.py on a CPU with AVX2 and a loopback RPC worker.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.errors import UsageError
from qnext.models.gguf_reader import read_header
from qnext.models.header import ModelHeader, TensorInfo
from qnext.models.shape import ModelShape, read_shape
from qnext.models.synth.synthesise import synthesise
from qnext.plan.expert_rules import expert_layers, expert_pattern
from qnext.plan.traits import AMX, DeviceTraits, amx_bytes, device_traits, host_traits, repack_rows
from qnext.plan.values import CPU_REPACK, HOST, Budget, Override, Placement
from qnext.plan.weights import (
    MAPPED,
    _matches,
    assign_buffers,
    buffer_bytes,
    layer_devices,
    weights_by_device,
)

EXPERT_NAMES = (
    "ffn_up_exps",
    "ffn_gate_up_exps",
    "ffn_down_chexps",
    "ffn_down_shexp",
    "ffn_gate_inp",
    "attn_q",
)

RPC = DeviceTraits("RPC0", "rpc", "RPC0[127.0.0.1:50052]")
CUDA = device_traits(Budget("CUDA0", "gpu", 0, "CUDA0"))
AVX2 = host_traits(["avx2", "avx512f"])
ON_RPC = Placement(devices=("RPC0",), n_gpu_layers=999)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ModelHeader, ModelShape]]:
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for name in ("tiny-qwen3next", "tiny-qwen3next-mtp", "tiny-qwen3moe", "tiny-gpt-oss", "tiny-qwen3"):
        synthesise(name, folder / f"{name}.gguf", quant="Q4_K_M", header_only=True)
        header = read_header(folder / f"{name}.gguf")
        made[name] = header, read_shape(header)
    return made


def buffers(
    model: tuple[ModelHeader, ModelShape],
    placement: Placement,
    *devices: DeviceTraits,
    host: DeviceTraits = AVX2,
) -> dict[str, int]:
    placed = assign_buffers(*model, placement, host, devices)
    return buffer_bytes(placed, placement, devices)


def where(
    model: tuple[ModelHeader, ModelShape], placement: Placement, *devices: DeviceTraits
) -> dict[str, str]:
    return {item.tensor.name: item.buffer for item in assign_buffers(*model, placement, AVX2, devices)}


Models = dict[str, tuple[ModelHeader, ModelShape]]


def test_ngl_counts_the_output_layer_and_takes_the_last_layers(models: Models) -> None:
    _, shape = models["tiny-qwen3next"]
    placement = replace(ON_RPC, n_gpu_layers=3)
    assert layer_devices(shape, placement, [RPC]) == (HOST,) * 6 + ("RPC0",) * 3
    assert layer_devices(shape, replace(placement, n_gpu_layers=8), [RPC])[0] == HOST
    assert layer_devices(shape, replace(placement, n_gpu_layers=-1), [RPC]) == ("RPC0",) * 9
    assert layer_devices(shape, replace(placement, devices=()), []) == (HOST,) * 9


def test_the_tensor_split_cuts_all_moved_layers_and_the_output(models: Models) -> None:
    _, shape = models["tiny-qwen3next"]
    second = DeviceTraits("RPC1", "rpc", "RPC1[127.0.0.1:50053]")
    placement = Placement(devices=("RPC0", "RPC1"), n_gpu_layers=99, tensor_split=(1, 2))
    assert layer_devices(shape, placement, [RPC, second]) == ("RPC0",) * 3 + ("RPC1",) * 6
    by_free = replace(placement, tensor_split=None)
    free = [replace(RPC, free_bytes=2 << 30), replace(second, free_bytes=1 << 30)]
    assert layer_devices(shape, by_free, free) == ("RPC0",) * 6 + ("RPC1",) * 3


def test_the_input_layer_stays_on_the_host_and_the_rest_moves(models: Models) -> None:
    places = where(models["tiny-qwen3next"], ON_RPC, RPC)
    assert places.pop("token_embd.weight") == HOST
    assert set(places.values()) == {RPC.buffer_type}


def test_the_first_matching_override_wins_and_searches_anywhere_in_the_name(models: Models) -> None:
    rules = (Override(r"blk\.1\.", HOST), Override("exps", CPU_REPACK))
    places = where(models["tiny-qwen3next"], replace(ON_RPC, overrides=rules), RPC)
    assert places["blk.1.ffn_up_exps.weight"] == places["blk.1.attn_norm.weight"] == HOST
    assert places["blk.2.ffn_up_exps.weight"] == CPU_REPACK
    assert places["blk.2.ffn_up_shexp.weight"] == RPC.buffer_type
    with pytest.raises(UsageError, match="regular expression"):
        where(models["tiny-qwen3next"], replace(ON_RPC, overrides=(Override("blk.(", HOST),)), RPC)


def test_a_tied_output_is_a_second_copy_only_in_another_buffer(models: Models) -> None:
    header, _ = models["tiny-qwen3"]
    embedding = next(t for t in header.tensors if t.name == "token_embd.weight").nbytes
    file_bytes = sum(t.nbytes for t in header.tensors)
    assert sum(buffers(models["tiny-qwen3"], Placement()).values()) == file_bytes
    assert sum(buffers(models["tiny-qwen3"], ON_RPC, RPC).values()) == file_bytes + embedding


def test_the_mtp_block_is_loaded_only_when_asked_for(models: Models) -> None:
    model = models["tiny-qwen3next-mtp"]
    without, with_it = (where(model, Placement(load_mtp=flag)) for flag in (False, True))
    assert {name for name in with_it if name not in without} == {n for n in with_it if n.startswith("blk.8.")}
    assert any("nextn" in name for name in with_it)


def test_repacking_takes_only_what_its_kernels_know(models: Models) -> None:
    header, _ = models["tiny-qwen3next"]
    types = {t.name: t.type_name for t in header.tensors}
    places = where(models["tiny-qwen3next"], Placement(extra_buffers=True))
    repacked = {name for name, buffer in places.items() if buffer == CPU_REPACK}
    assert {types[name] for name in repacked} == {"Q4_K"}
    assert "token_embd.weight" not in repacked
    assert set(where(models["tiny-qwen3next"], Placement()).values()) == {HOST}


def test_mxfp4_experts_repack_and_their_biases_do_not(models: Models) -> None:
    places = where(models["tiny-gpt-oss"], Placement(extra_buffers=True))
    assert places["blk.0.ffn_up_exps.weight"] == CPU_REPACK
    assert places["blk.0.ffn_up_exps.bias"] == HOST


def test_instruction_sets_decide_what_repacks() -> None:
    assert repack_rows("Q4_K", frozenset({"avx2"})) == 8
    assert repack_rows("Q2_K", frozenset({"avx2"})) == 0
    assert repack_rows("Q2_K", frozenset({"avx2", "avx512f"})) == 8
    assert repack_rows("Q6_K", frozenset({"avx2"})) == 0
    assert repack_rows("Q6_K", frozenset({"neon", "dotprod"})) == 8
    assert repack_rows("Q8_0", frozenset()) == 0
    assert host_traits(["avx2"]).extra_buffers == (CPU_REPACK,)
    assert host_traits(["amx_tile", "amx_int8", "avx512_vnni"]).extra_buffers == (AMX, CPU_REPACK)


def test_amx_takes_the_matrices_and_leaves_the_experts_to_repacking(models: Models) -> None:
    host = host_traits(["avx2", "amx_tile", "amx_int8", "avx512_vnni"])
    placed = assign_buffers(*models["tiny-qwen3next"], Placement(extra_buffers=True), host, ())
    places = {item.tensor.name: item.buffer for item in placed}
    assert places["output.weight"] == AMX
    assert places["blk.0.ffn_up_exps.weight"] == CPU_REPACK
    # ggml-cpu/amx/mmq.cpp, get_row_size: a Q4_K block of 144 bytes is packed into 148.
    assert amx_bytes(TensorInfo("x.weight", (256, 64), "Q4_K", 64 * 144, 0, 0)) == 64 * 148


def test_pinned_memory_takes_the_host_share_except_under_mmap(models: Models) -> None:
    placement = Placement(devices=("CUDA0",), n_gpu_layers=999, overrides=(Override("exps", HOST),))
    read = buffers(models["tiny-qwen3next"], replace(placement, extra_buffers=True), CUDA)
    assert set(read) == {"CUDA0", "CUDA_Host"}
    mapped = buffers(models["tiny-qwen3next"], replace(placement, load_mode="mmap"), CUDA)
    assert set(mapped) == {"CUDA0", MAPPED}
    assert weights_by_device(read, [CUDA])[HOST] == read["CUDA_Host"]


def test_cuda_pads_tensors_to_128_bytes_and_quantised_rows_to_512_elements() -> None:
    # ggml-cuda.cu: get_alignment, get_alloc_size; 256 more elements of Q8_0 are 8 blocks of 34 bytes.
    assert CUDA.alloc_bytes((4,), "F32", 16) == 128
    assert CUDA.alloc_bytes((256, 10), "Q8_0", 2720) == 3072
    assert CUDA.alloc_bytes((512, 10), "Q8_0", 5440) == 5504
    assert CUDA.alloc_bytes((256, 10), "F16", 5120) == 5120


def test_small_tensors_are_padded_to_32_bytes() -> None:
    # log: 192 DeltaNet layers of 256 hold ssm_a and ssm_dt.bias of 16 bytes each, which take 32.
    assert RPC.alloc_bytes((4,), "F32", 16) == 32


def test_a_mapped_file_counts_from_its_first_to_its_last_host_tensor(models: Models) -> None:
    header, _ = models["tiny-qwen3next"]
    whole = header.tensors[-1].offset + header.tensors[-1].nbytes - header.tensors[0].offset
    mapped = Placement(load_mode="mmap")
    assert buffers(models["tiny-qwen3next"], mapped) == {MAPPED: whole}
    last = Override(r"blk\.7\.ffn_down_shexp", HOST)
    offloaded = replace(ON_RPC, load_mode="mmap", overrides=(last,))
    assert buffers(models["tiny-qwen3next"], offloaded, RPC)[MAPPED] == whole
    split = replace(
        header, tensors=tuple(replace(t, shard=int(t.name.startswith("blk.7"))) for t in header.tensors)
    )
    assert buffers((split, models["tiny-qwen3next"][1]), mapped)[MAPPED] <= whole


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_devices_sum_to_the_tensors_whatever_the_placement(models: Models, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["tiny-qwen3next", "tiny-qwen3moe", "tiny-gpt-oss"]))
    layers = data.draw(st.integers(0, 12))
    cpu_layers = data.draw(st.sets(st.integers(0, 7), min_size=1))
    rule = Override(rf"blk\.({'|'.join(map(str, sorted(cpu_layers)))})\.ffn_.*_exps", HOST)
    placement = replace(
        ON_RPC, n_gpu_layers=layers, overrides=(rule,), extra_buffers=data.draw(st.booleans())
    )
    header, _ = models[name]
    sizes = buffers(models[name], placement, RPC)
    padded = sum(RPC.alloc_bytes(t.shape, t.type_name, t.nbytes) for t in header.tensors)
    assert sum(weights_by_device(sizes, [RPC]).values()) == sum(sizes.values()) == padded


@pytest.mark.parametrize("name", ["tiny-qwen3next", "tiny-qwen3moe", "tiny-gpt-oss", "tiny-qwen3next-mtp"])
def test_more_gpu_layers_never_leave_more_weights_on_the_host(name: str, models: Models) -> None:
    on_host = [
        weights_by_device(buffers(models[name], replace(ON_RPC, n_gpu_layers=count), RPC), [RPC]).get(HOST, 0)
        for count in range(12)
    ]
    assert on_host == sorted(on_host, reverse=True)
    assert on_host[0] > on_host[-1]


@given(st.sets(st.integers(0, 99), min_size=1), st.integers(0, 120), st.sampled_from(EXPERT_NAMES))
def test_our_own_pattern_is_read_as_a_regular_expression_would_be(
    layers: set[int], layer: int, name: str
) -> None:
    pattern = expert_pattern(tuple(sorted(layers)))
    tensor = f"blk.{layer}.{name}.weight"
    named = expert_layers(pattern)
    assert named == {str(one) for one in layers}
    assert _matches(Override(pattern, HOST))[tensor] == bool(re.search(pattern, tensor))
    assert expert_layers(pattern + "x") is None and expert_layers("exps") is None
