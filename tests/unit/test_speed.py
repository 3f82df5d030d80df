"""The forecast: no machine makes it fail, a better one is never slower, its constants are the data's fit."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.models.shape import ModelShape
from qnext.plan import kernels
from qnext.plan.placement import ALL_LAYERS, Problem, check_placement, find_placement
from qnext.plan.speed import (
    MachineSpeeds,
    Work,
    active_work,
    decode_parts,
    decode_terms,
    predict_speed,
    situation,
    total_ns,
)
from qnext.plan.values import HOST, Override, Placement, Prediction, Workload
from qnext.plan.weights import assign_buffers
from qnext.units import GIB, MIB
from tests.planning import DENSE, MIXTURES, model, problem

GB = 1_000_000_000


def forecast(
    asked: Problem, placement: Placement, speeds: MachineSpeeds, workload: Workload | None = None
) -> Prediction:
    used = asked.used(placement)
    placed = assign_buffers(asked.header, asked.shape, placement, asked.traits[HOST], used)
    prediction, _ = predict_speed(
        asked.shape,
        placement,
        placed,
        check_placement(asked, placement).memory.devices,
        {device.buffer_type: device.name for device in used},
        speeds,
        workload or Workload(),
    )
    return prediction


def mids(prediction: Prediction) -> tuple[float, float]:
    assert prediction.decode_tps is not None
    assert prediction.prefill_tps is not None
    for speed in (prediction.decode_tps, prediction.prefill_tps):
        assert math.isfinite(speed.high)
        assert 0 <= speed.low <= speed.mid <= speed.high
    return prediction.decode_tps.mid, prediction.prefill_tps.mid


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from((*MIXTURES, DENSE)),
    st.dictionaries(st.sampled_from(["CUDA0", "RPC0"]), st.integers(0, 40 * MIB)),
    st.none() | st.just(0) | st.integers(10**6, 10**13),
    st.dictionaries(st.sampled_from(["CUDA0", "RPC0"]), st.just(0) | st.integers(10**6, 10**13)),
    st.integers(0, 256),
    st.builds(Workload, st.integers(0, 10**6), st.integers(0, 100), st.integers(0, 10**6)),
)
def test_any_machine_and_workload_gives_a_finite_forecast(
    name: str, gpus: dict[str, int], ram: int | None, devices: dict[str, int], cores: int, workload: Workload
) -> None:
    asked = problem(name, gpus)
    placement = find_placement(asked, Placement(context=4096, threads=1)).placement
    speeds = MachineSpeeds(ram, "given", devices, cores, "unheard of", devices)
    assert len(mids(forecast(asked, placement, speeds, workload))) == 2


@pytest.mark.parametrize("where", [{}, {"CUDA0": 20 * MIB}, {"CUDA0": GIB}])
def test_more_bandwidth_is_never_slower_and_more_depth_never_faster(where: dict[str, int]) -> None:
    asked = problem(gpus=where)
    placement = find_placement(asked, Placement(context=32_768, ubatch=512)).placement
    slow = MachineSpeeds(20 * GB, "given", {"CUDA0": 300 * GB}, 4, "avx2", {"CUDA0": 8 * GB})
    fast = MachineSpeeds(80 * GB, "given", {"CUDA0": 900 * GB}, 4, "avx2", {"CUDA0": 32 * GB})
    assert mids(forecast(asked, placement, fast)) >= mids(forecast(asked, placement, slow))
    deep = mids(forecast(asked, placement, slow, Workload(depth=30_000)))
    assert deep[0] < mids(forecast(asked, placement, slow))[0]


def work_on(asked: Problem, placement: Placement) -> dict[str, Work]:
    used = asked.used(placement)
    placed = assign_buffers(asked.header, asked.shape, placement, asked.traits[HOST], used)
    return dict(active_work(asked.shape, placed, {d.buffer_type: d.name for d in used}).work)


def test_only_the_experts_that_are_used_count_and_embeddings_do_not() -> None:
    header, shape = model("tiny-qwen3next")
    tensors = {tensor.name: tensor.nbytes for tensor in header.tensors}
    experts = sum(layer.expert_bytes for layer in shape.layer_bytes)
    rest = sum(tensors.values()) - experts - tensors["token_embd.weight"]
    read = work_on(problem(), Placement())[HOST].bytes
    assert read == pytest.approx(rest + experts * shape.experts_used / shape.experts, abs=len(tensors))


def test_tied_output_matrix_is_read_where_it_is() -> None:
    asked = problem(DENSE, {"CUDA0": GIB})
    everything = sum(tensor.nbytes for tensor in asked.header.tensors)
    assert work_on(asked, Placement())[HOST].bytes == everything
    there = work_on(asked, Placement(devices=("CUDA0",), n_gpu_layers=ALL_LAYERS))
    assert there["CUDA0"].bytes == everything
    assert HOST not in there


def test_layers_cross_wherever_their_experts_were_put_by_whatever_rule() -> None:
    asked = problem(gpus={"CUDA0": GIB})
    for rules in ((Override("exps", HOST),), (Override(r"blk\.[0-7]\.ffn_.*_exps", HOST),)):
        placement = Placement(devices=("CUDA0",), n_gpu_layers=ALL_LAYERS, overrides=rules)
        used = asked.used(placement)
        placed = assign_buffers(asked.header, asked.shape, placement, asked.traits[HOST], used)
        crossing = active_work(asked.shape, placed, {"CUDA0": "CUDA0"}).crossings["CUDA0"]
        assert crossing.layers == 8
        assert crossing.bytes == sum(layer.expert_bytes for layer in asked.shape.layer_bytes)


# Public figures of the 80B-A3B models: quant, RAM and VRAM bandwidth (GB/s), cores, CPU expert layers (None:
# no GPU), decode t/s. Bandwidths are rated ones, those of RAM a guess where the source is silent; Q4_K_M
# stands in for IQ4_XS and UD-Q4_K_XL; builds are of different dates. So the rule is a factor of three.
PUBLISHED = [
    ("RTX 3090 + 7950X, UD-Q4_K_XL, --n-cpu-moe 28", "Q4_K_M", 83, 936, 16, 28, 52.6),
    ("RTX 3090 + 7950X, UD-Q6_K_XL, --n-cpu-moe 34", "Q6_K", 83, 936, 16, 34, 35.6),
    ("RTX 5070 Ti + 5060 Ti, Q4_K_M, 20 of 48 on the CPU", "Q4_K_M", 80, 670, 8, 20, 50.3),
    ("2x RTX 3090, IQ4_XS, all of it", "Q4_K_M", 50, 936, 8, 0, 104.0),
    ("Ryzen 3995WX, IQ4_XS, CPU alone", "Q4_K_M", 204, None, 64, None, 23.3),
    ("Ryzen AI 9 HX 370, Q4_K_M, CPU alone", "Q4_K_M", 120, None, 12, None, 7.74),
]


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row[0])
def test_published_decode_speeds_are_in_the_forecasts_reach(
    row: tuple[str, str, int, int | None, int, int | None, float],
) -> None:
    _, quant, ram, vram, cores, moved, published = row
    header, shape = model("qwen3-next-80b-a3b", quant)
    asked = replace(
        problem(gpus={"CUDA0": 100 * GIB} if vram else {}, host=100 * GIB), header=header, shape=shape
    )
    asked = replace(asked, options=replace(asked.options, cpu_experts=moved))
    placement = find_placement(asked, Placement(context=8192, threads=cores, threads_batch=cores)).placement
    devices = {"CUDA0": vram * GB} if vram else {}
    speeds = MachineSpeeds(round(ram * 0.8 * GB), "rated", devices, cores, "avx2")
    decode = mids(forecast(asked, placement, speeds))[0]
    assert published / 3 < decode < published * 3


def test_offloaded_prefill_is_bound_by_the_link_and_gains_from_a_larger_ubatch() -> None:
    header, shape = model("qwen3-next-80b-a3b", "Q4_K_M")
    asked = replace(
        problem(gpus={"CUDA0": 100 * GIB}, host=100 * GIB, cpu_experts=40), header=header, shape=shape
    )
    speeds = MachineSpeeds(70 * GB, "rated", {"CUDA0": 504 * GB}, 8, "avx2", {"CUDA0": 32 * GB})
    speed = {}
    for ubatch in (512, 2048):
        placement = find_placement(asked, Placement(ubatch=ubatch, threads_batch=8)).placement
        speed[ubatch] = mids(forecast(asked, placement, speeds, Workload(prompt=4096)))[1]
    # 175 and 535 t/s were measured on an offloaded model (public report).
    assert 175 / 3 < speed[512] < 175 * 3
    assert 535 / 3 < speed[2048] < 535 * 3
    assert 2 < speed[2048] / speed[512] < 4


def test_shape_of_a_published_row_is_the_real_one() -> None:
    shape: ModelShape = model("qwen3-next-80b-a3b", "Q4_K_M")[1]
    assert (shape.n_layer, shape.experts, shape.experts_used) == (48, 512, 10)


def real(quant: str = "Q4_K_M", **limits: object) -> Problem:
    header, shape = model("qwen3-next-80b-a3b", quant)
    asked = problem(host=100 * GIB, **limits)  # type: ignore[arg-type]
    return replace(asked, header=header, shape=shape)


BOX = MachineSpeeds(60 * GB, "given", {"CUDA0": 500 * GB}, 8, "avx2", {"CUDA0": 16 * GB})


@pytest.mark.parametrize(
    "better",
    [
        replace(BOX, ram_bps=90 * GB),
        replace(BOX, device_bps={"CUDA0": 900 * GB}),
        replace(BOX, cores=16),
        replace(BOX, link_bps={"CUDA0": 32 * GB}),
        replace(BOX, instruction_set="avx512"),
    ],
    ids=["RAM", "VRAM", "cores", "link", "instructions"],
)
@pytest.mark.parametrize("vram", [0, 8, 16, 100])
def test_a_better_machine_is_never_slower(better: MachineSpeeds, vram: int) -> None:
    asked = real(gpus={"CUDA0": vram * GIB} if vram else {})
    before, after = (
        mids(
            forecast(
                asked,
                find_placement(
                    asked, Placement(context=8192, threads=one.cores, threads_batch=one.cores)
                ).placement,
                one,
            )
        )
        for one in (BOX, better)
    )
    assert after[0] >= before[0]
    assert after[1] >= before[1]


def test_more_vram_of_one_card_is_never_slower() -> None:
    speeds = []
    for vram in (6, 8, 12, 16, 24, 32, 48, 64):
        asked = real(gpus={"CUDA0": vram * GIB})
        placement = find_placement(asked, Placement(context=8192, threads=8, threads_batch=8)).placement
        speeds.append(mids(forecast(asked, placement, BOX)))
    assert [decode for decode, _ in speeds] == sorted(decode for decode, _ in speeds)
    assert [prefill for _, prefill in speeds] == sorted(prefill for _, prefill in speeds)


@pytest.mark.parametrize("others", [{}, {"RPC0": 12 * GIB}, {"CUDA1": 12 * GIB}], ids=["one", "rpc", "two"])
def test_every_term_of_a_forecast_has_a_constant_and_a_part(others: dict[str, int]) -> None:
    asked = real(gpus={"CUDA0": 12 * GIB, **others})
    placement = find_placement(asked, Placement(context=8192, threads=8)).placement
    used = asked.used(placement)
    placed = assign_buffers(asked.header, asked.shape, placement, asked.traits[HOST], used)
    load = active_work(asked.shape, placed, {device.buffer_type: device.name for device in used})
    devices = check_placement(asked, placement).memory.devices
    terms = decode_terms(load, placement, devices, BOX, Workload(depth=4096))
    assert set(terms) - {"rpc"} <= set(kernels.FITTED)
    assert ("rpc" in terms) == ("RPC0" in others)
    assert ("gpu_hop" in terms) == ("CUDA1" in others)
    assert placement.cpu_expert_layers  # of the tail, so with RPC those of the worker
    assert ("crossing" in terms) == ("RPC0" not in others)
    assert sum(decode_parts(terms).values()) == pytest.approx(total_ns(terms))
    assert situation(load) == "mixed"


def test_kernels_are_told_apart_by_tensor_type() -> None:
    families = {name: kernels.kernel_family(name) for name in ("Q8_0", "Q4_K", "MXFP4", "IQ4_XS", "IQ3_XXS")}
    assert list(families.values()) == ["plain", "block", "block", "block", "lookup"]
    devices = ("CUDA1", "ROCm0", "Vulkan0", "MTL0")
    assert [kernels.backend_of_device(name) for name in devices] == ["cuda", "rocm", "vulkan", "metal"]


def fit_script() -> ModuleType:
    """`scripts/fit_speed.py` as a module."""
    path = Path(__file__).parents[2] / "scripts" / "fit_speed.py"
    spec = importlib.util.spec_from_file_location("fit_speed", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.thorough
def test_the_constants_are_the_fit_of_the_published_measurements() -> None:
    script = fit_script()
    assert script.data_digest() == kernels.DATA_DIGEST, "run scripts/fit_speed.py --write"
    fitted = script.fit_all(script.read_rows())
    assert fitted.keys() - kernels.FITTED.keys() == {"old", "old_cpu", "old_prefill"}
    for name, value in kernels.FITTED.items():
        assert value == pytest.approx(fitted[name], rel=0.01), name


def test_reading_is_never_faster_than_the_memory_and_ranges_hold_the_forecast() -> None:
    assert all(value >= 1 for name, value in kernels.FITTED.items() if "_read_" in name)
    for spread in (kernels.DECODE_RANGE, kernels.PREFILL_RANGE):
        assert set(spread) == {"gpu", "gpus", "mixed", "cpu"}
        assert all(0.2 < low < 1 < high < 5 for low, high in spread.values())
