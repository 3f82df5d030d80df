"""A whole plan adds up, equals what real loads allocated, and its compute estimate is near the dry runs'.

The figures in MiB are "… buffer size" lines of llama.cpp 0.5.0's log (llama-cpp-python 0.3.36): real loads of
the tiny models with a loopback RPC worker, and dry runs over the true shapes. scripts/bench_memory_exact.py
repeats the comparison for every family and finds new ones.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from qnext.errors import UsageError
from qnext.models.gguf_reader import read_header
from qnext.models.header import ModelHeader
from qnext.models.shape import ModelShape, read_shape
from qnext.models.synth.synthesise import synthesise
from qnext.plan.memory import MemoryPlan, plan_memory
from qnext.plan.traits import host_traits
from qnext.plan.values import CPU_REPACK, HOST, Budget, Override, Placement
from qnext.plan.weights import MAPPED
from qnext.units import GIB, MIB

RPC = "RPC0[127.0.0.1:50052]"
BUDGETS = (Budget(HOST, "host", 64 * GIB, HOST), Budget("RPC0", "rpc", 16 * GIB, RPC))
CUDA = (BUDGETS[0], Budget("CUDA0", "gpu", 16 * GIB, "CUDA0"))
NAMES = (
    "qwen3-next-80b-a3b qwen3-30b-a3b gpt-oss-20b"
    " tiny-qwen3next tiny-qwen3next-mtp tiny-gpt-oss tiny-qwen3moe tiny-qwen3"
)
BASE = Placement(context=5000, batch=512, ubatch=256)
EXTRA = replace(BASE, extra_buffers=True)
SPLIT = replace(
    BASE, parallel=4, kv_type_k="q8_0", kv_type_v="q8_0", devices=("RPC0",), n_gpu_layers=5,
    overrides=(Override("_exps", HOST),),
)  # fmt: skip
MAPPED_HALF = replace(BASE, load_mode="mmap", load_mtp=True, devices=("RPC0",), n_gpu_layers=5)

Models = dict[str, tuple[ModelHeader, ModelShape]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for name in NAMES.split():
        synthesise(name, folder / f"{name}.gguf", quant="Q4_K_M", header_only=True)
        header = read_header(folder / f"{name}.gguf")
        made[name] = header, read_shape(header)
    return made


def plan(
    model: tuple[ModelHeader, ModelShape], placement: Placement, budgets: tuple[Budget, ...] = BUDGETS
) -> MemoryPlan:
    return plan_memory(*model, placement, budgets, host=host_traits(["avx2", "avx512f"]))


@pytest.mark.parametrize(
    ("name", "placement", "logged_mib"),
    [
        ("tiny-qwen3next", EXTRA, {HOST: 4.28, CPU_REPACK: 12.91}),
        ("tiny-qwen3next", SPLIT, {HOST: 15.83, RPC: 1.36}),
        ("tiny-qwen3next", MAPPED_HALF, {MAPPED: 8.77, RPC: 8.63}),
        ("tiny-qwen3next-mtp", EXTRA, {HOST: 4.28, CPU_REPACK: 12.91}),
        ("tiny-qwen3next-mtp", SPLIT, {HOST: 16.10, RPC: 1.09}),
        ("tiny-qwen3next-mtp", MAPPED_HALF, {MAPPED: 10.73, RPC: 8.98}),
        ("tiny-gpt-oss", EXTRA, {HOST: 0.80, CPU_REPACK: 10.16}),
        ("tiny-gpt-oss", SPLIT, {HOST: 10.24, RPC: 0.73}),
        ("tiny-gpt-oss", MAPPED_HALF, {MAPPED: 3.88, RPC: 7.29}),
        ("tiny-qwen3moe", EXTRA, {HOST: 2.15, CPU_REPACK: 9.60}),
        ("tiny-qwen3moe", SPLIT, {HOST: 11.03, RPC: 0.72}),
        ("tiny-qwen3", EXTRA, {HOST: 0.37, CPU_REPACK: 1.16}),
        ("tiny-qwen3", SPLIT, {HOST: 0.63, RPC: 1.11}),
        ("tiny-qwen3", MAPPED_HALF, {MAPPED: 0.63, RPC: 1.11}),
    ],
)
def test_weight_buffers_are_what_a_real_load_allocated(
    models: Models, name: str, placement: Placement, logged_mib: dict[str, float]
) -> None:
    found = {buffer: size / MIB for buffer, size in plan(models[name], placement).buffers.items()}
    assert found == pytest.approx(logged_mib, abs=0.0051)


def test_the_parts_of_a_plan_lie_with_their_devices(models: Models) -> None:
    host, remote = plan(models["tiny-qwen3next"], SPLIT).devices
    assert (host.name, host.kind, host.budget_bytes) == (HOST, "host", 64 * GIB)
    assert (remote.name, remote.kind, remote.budget_bytes) == ("RPC0", "rpc", 16 * GIB)
    assert host.weights_bytes > remote.weights_bytes > 0
    assert host.other_bytes == 4 * 1024 * 4  # logits of four slots
    assert remote.other_bytes == 0
    assert min(host.kv_bytes, remote.kv_bytes, host.recurrent_bytes, remote.recurrent_bytes) > 0


def test_a_dry_runs_figures_replace_the_estimate(models: Models) -> None:
    found = plan_memory(*models["tiny-qwen3next"], SPLIT, BUDGETS, compute={HOST: 11, "RPC0": 22})
    assert [device.compute_bytes for device in found.devices] == [11, 22]
    assert not found.compute_estimated
    assert plan(models["tiny-qwen3next"], SPLIT).compute_estimated


def test_a_device_without_a_budget_is_an_error_with_a_way_out(models: Models) -> None:
    with pytest.raises(UsageError) as caught:
        plan(models["tiny-qwen3next"], SPLIT, BUDGETS[:1])
    assert "--device-memory RPC0=" in caught.value.hint


def test_weights_in_ram_twice_are_said(models: Models) -> None:
    both = plan(models["tiny-qwen3next"], replace(EXTRA, load_mode="mmap"))
    (reason,) = both.reasons
    assert reason.what == "weights are in RAM twice"
    assert reason.numbers["repacked_bytes"] == both.buffers[CPU_REPACK]
    once = plan(models["tiny-qwen3next"], EXTRA)
    assert not once.reasons
    assert both.devices[0].weights_bytes > 1.5 * once.devices[0].weights_bytes


TAIL = Override("blk.(1[6-9]|[2-4][0-9]).ffn_.*_exps", HOST)
ALL_EXPERTS = Override("_exps", HOST)


@pytest.mark.parametrize(
    ("name", "context", "ubatch", "outputs", "on_rpc", "overrides", "logged_mib"),
    [
        ("qwen3-next-80b-a3b", 32768, 512, 0, False, (), {HOST: 340.76}),
        ("qwen3-next-80b-a3b", 262144, 512, 0, False, (), {HOST: 342.01}),
        ("qwen3-next-80b-a3b", 32768, 2048, 0, False, (), {HOST: 1363.05}),
        ("qwen3-next-80b-a3b", 32768, 2048, 1, False, (), {HOST: 472.05}),
        ("qwen3-next-80b-a3b", 4096, 4096, 0, False, (), {HOST: 2502.11}),
        ("qwen3-next-80b-a3b", 4096, 128, 1, False, (), {HOST: 22.50}),
        ("qwen3-next-80b-a3b", 4096, 512, 1, True, (), {HOST: 12.01, "RPC0": 86.01}),
        ("qwen3-next-80b-a3b", 262144, 2048, 1, True, (), {HOST: 1056.05, "RPC0": 1352.04}),
        ("qwen3-next-80b-a3b", 32768, 512, 1, True, (ALL_EXPERTS,), {HOST: 111.01, "RPC0": 120.03}),
        ("qwen3-next-80b-a3b", 32768, 512, 1, True, (TAIL,), {HOST: 86.0, "RPC0": 114.0}),
        ("qwen3-next-80b-a3b", 262144, 512, 0, True, (TAIL,), {HOST: 264.0, "RPC0": 344.8}),
        ("qwen3-30b-a3b", 32768, 512, 1, False, (), {HOST: 120.01}),
        ("qwen3-30b-a3b", 32768, 512, 1, True, (), {HOST: 40.01, "RPC0": 116.01}),
        ("qwen3-30b-a3b", 4096, 512, 1, True, (ALL_EXPERTS,), {HOST: 76.26, "RPC0": 52.01}),
        ("gpt-oss-20b", 32768, 512, 0, False, (), {HOST: 409.63}),
        ("gpt-oss-20b", 4096, 128, 1, False, (), {HOST: 24.16}),
        ("gpt-oss-20b", 4096, 128, 1, True, (ALL_EXPERTS,), {HOST: 20.75, "RPC0": 11.91}),
    ],
)
def test_the_compute_estimate_is_within_a_tenth_of_the_dry_run(
    models: Models,
    name: str,
    context: int,
    ubatch: int,
    outputs: int,
    on_rpc: bool,
    overrides: tuple[Override, ...],
    logged_mib: dict[str, float],
) -> None:
    placement = Placement(
        context=context, batch=max(2048, ubatch), ubatch=ubatch, outputs_max=outputs, overrides=overrides,
        devices=("RPC0",) if on_rpc else (), n_gpu_layers=999,
    )  # fmt: skip
    found = {device.name: device.compute_bytes / MIB for device in plan(models[name], placement).devices}
    assert found == pytest.approx(logged_mib, rel=0.1)


@pytest.mark.parametrize(
    ("name", "context", "ubatch", "outputs", "logged_mib"),
    [
        ("qwen3-next-80b-a3b", 32768, 2048, 1, (592, 904, 904)),
        ("qwen3-next-80b-a3b", 131072, 512, 0, (532, 610, 837)),
        ("qwen3-30b-a3b", 4096, 512, 1, (36, 116, 116)),
        ("qwen3-30b-a3b", 32768, 2048, 0, (592, 912, 1779)),
        ("gpt-oss-20b", 131072, 512, 1, (543, 624, 624)),
    ],
)
def test_devices_that_work_in_a_pipeline_keep_four_copies_of_what_they_are_sent(
    models: Models, name: str, context: int, ubatch: int, outputs: int, logged_mib: tuple[int, ...]
) -> None:
    placement = Placement(
        context=context, ubatch=ubatch, outputs_max=outputs, devices=("RPC0", "RPC1"), n_gpu_layers=999,
        tensor_split=(1.0, 1.0),
    )  # fmt: skip
    budgets = (*BUDGETS, replace(BUDGETS[1], name="RPC1", buffer_type="RPC0[127.0.0.1:50053]"))
    found = [device.compute_bytes / MIB for device in plan(models[name], placement, budgets).devices]
    assert found == pytest.approx(logged_mib, rel=0.04)
    for apart in (replace(placement, overrides=(TAIL,)), replace(placement, kv_offload=False)):
        single = [device.compute_bytes / MIB for device in plan(models[name], apart, budgets).devices]
        assert single[1] < 0.8 * found[1]


def test_limiting_outputs_saves_the_logits_of_a_whole_ubatch(models: Models) -> None:
    many, few = (
        plan(models["qwen3-next-80b-a3b"], Placement(context=8192, ubatch=2048, outputs_max=n)).devices[0]
        for n in (0, 1)
    )
    assert many.compute_bytes - few.compute_bytes > 800 * MIB


def test_a_gpu_that_multiplies_cpu_experts_needs_room_for_one_matrix_of_them(models: Models) -> None:
    model = models["qwen3-next-80b-a3b"]
    placement = Placement(
        devices=("CUDA0",), n_gpu_layers=999, overrides=(ALL_EXPERTS,), outputs_max=1, ubatch=512
    )
    largest = max(t.nbytes for t in model[0].tensors if "_exps" in t.name)
    with_it = plan(model, placement, CUDA).devices[1].compute_bytes
    without = plan(model, replace(placement, op_offload=False), CUDA).devices[1].compute_bytes
    assert with_it > largest
    assert without < with_it
    repacked = replace(placement, overrides=(Override("_exps", CPU_REPACK),))
    assert plan(model, repacked, CUDA).devices[1].compute_bytes < largest
