"""Faults of constructed and recorded machines: which findings, how bad, at the planner's price."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from qnext.doctor.case import Case, Circumstances
from qnext.doctor.examine import examine
from qnext.doctor.values import EngineFacts, Finding, Variable
from qnext.doctor.words import price_text
from qnext.hardware import Machine, NumaNode, list_profiles, load_machine
from qnext.models.header import ModelHeader
from qnext.models.shape import ModelShape, read_shape
from qnext.models.synth.imagined import imagined_header
from qnext.plan.options import Wishes
from qnext.units import GIB, MIB

MODEL = "Qwen3-Next-80B-A3B Q4_K_M"
BOX = "rtx5080-128gb"
ENGINE = EngineFacts(
    build="llama-cpp-python 0.3.36",
    pinned_version="llama-cpp-python 0.3.36",
    claimants=("llama-cpp-python 0.3.36",),
    backends=("cpu", "cuda", "rpc"),
    safe_layout="full",
    rebuild="rebuild it",
)


@cache
def _model() -> tuple[ModelHeader, ModelShape]:
    header = imagined_header("qwen3-next-80b-a3b", "Q4_K_M")
    return header, read_shape(header)


def case(machine: Machine, *, here: dict[str, Any] | None = None, **about: Any) -> Case:
    header, shape = _model()
    return Case(Circumstances(machine, **(here or {})), MODEL, header, shape, **about)


def changed(part: str, **values: Any) -> Machine:
    """The healthy box with some facts of `cpu`, `memory`, `disk` or its first GPU changed."""
    box = load_machine(BOX)
    if part == "gpu":
        return replace(box, gpus=(replace(box.gpus[0], **values),))
    return replace(box, **{part: replace(getattr(box, part), **values)})


def ids(found: tuple[Finding, ...]) -> list[str]:
    return [finding.id for finding in found]


FAULTS: list[tuple[Machine, list[str]]] = [
    (changed("memory", channels=1, channels_max=2, rated_bandwidth_bps=38_400_000_000), ["memory-channels"]),
    (changed("memory", channels=1, channels_max=None), ["memory-channels"]),
    (changed("memory", speed_mtps=4800, speed_max_mtps=6000), ["memory-profile"]),
    (changed("memory", measured_bandwidth_bps=35_000_000_000), ["memory-slow"]),
    (changed("memory", measured_bandwidth_bps=45_000_000_000), []),
    (changed("memory", measured_bandwidth_bps=60_000_000_000), []),
    (
        changed("memory", limit_bytes=16 * GIB, usable_bytes=15 * GIB),
        ["memory-limit", "memory-too-small"],
    ),
    (changed("memory", limit_bytes=100 * GIB, usable_bytes=99 * GIB), ["memory-limit"]),
    (
        changed("memory", limit_bytes=60 * GIB, available_bytes=20 * GIB, usable_bytes=20 * GIB),
        ["memory-limit", "memory-too-small"],
    ),
    (changed("memory", swap_total_bytes=8 * GIB, swap_free_bytes=4 * GIB), ["swap-in-use"]),
    (changed("memory", swap_total_bytes=8 * GIB, swap_free_bytes=8 * GIB - 100 * MIB), []),
    (changed("memory", usable_bytes=6 * GIB), ["memory-too-small"]),
    (changed("memory", locked_limit_bytes=8 * MIB), []),
    (changed("memory", transparent_hugepages="never"), ["huge-pages-off"]),
    (changed("memory", hugepages_total_bytes=GIB, hugepages_free_bytes=GIB), ["huge-pages-reserved"]),
    (changed("memory", hugepages_total_bytes=8 * GIB, hugepages_free_bytes=0), []),
    (changed("memory", numa_nodes=(NumaNode(0, 64 * GIB, 16), NumaNode(1, 96 * GIB, 0))), []),
    (
        changed("memory", numa_nodes=(NumaNode(0, 64 * GIB, 16), NumaNode(1, 64 * GIB, 16))),
        ["numa-not-interleaved"],
    ),
    (
        changed(
            "memory",
            numa_nodes=(NumaNode(0, 64 * GIB, 16), NumaNode(1, 64 * GIB, 16)),
            numa_policy="interleave",
        ),
        [],
    ),
    (changed("cpu", usable_cores=4, usable_logical_cores=4, quota_cores=4.0), ["cpu-limit"]),
    (changed("cpu", governor="powersave"), ["cpu-powersave"]),
    (changed("cpu", power_profile="low-power"), ["cpu-powersave"]),
    (changed("cpu", instruction_sets=("sse4_2",)), ["cpu-without-avx2"]),
    (changed("gpu", pcie_gen_loaded=4, pcie_width_loaded=4), ["gpu-link"]),
    (changed("gpu", pcie_width_max=8, pcie_width_card_max=16, pcie_width_slot_max=8), ["gpu-link"]),
    (changed("gpu", pcie_gen=1, pcie_gen_loaded=5, pcie_width_loaded=16), []),
    (changed("gpu", h2d_pinned_bps=9_000_000_000, pcie_gen_loaded=5), ["gpu-copies-slow"]),
    (changed("gpu", h2d_pinned_bps=50_000_000_000), []),
    (changed("gpu", power_limit_w=250, power_default_w=360), ["gpu-power-cap"]),
    (changed("gpu", power_limit_w=360, power_default_w=360), []),
    (changed("gpu", throttle_reasons=("temperature, by the driver",)), ["gpu-throttled"]),
    (changed("gpu", throttle_reasons=("power cap",)), []),
    (changed("gpu", pcie_gen_max=4, pcie_gen_card_max=5, pcie_gen_slot_max=4), ["gpu-link"]),
    (changed("gpu", throttle_reasons=()), []),
    (changed("gpu", vram_free_bytes=8 * GIB), ["gpu-memory-held"]),
    (changed("gpu", vram_others_bytes=6 * GIB, processes=2, vram_free_bytes=9 * GIB), ["gpu-memory-held"]),
    (changed("disk", filesystem="nfs4", network=True), ["disk-network"]),
    (changed("disk", filesystem="fuse.mergerfs", network=False, fuse=True), ["disk-fuse"]),
    (changed("disk", read_bps=500_000_000), ["disk-slow"]),
    (changed("disk", read_bps=5_000_000_000), []),
    (changed("disk", free_bytes=20 * GIB), ["disk-full"]),
]


@pytest.mark.parametrize(("machine", "expected"), FAULTS)
def test_one_fault_gives_its_finding_and_no_other(machine: Machine, expected: list[str]) -> None:
    found = examine(case(machine, engine=ENGINE))
    assert sorted(ids(found)) == sorted(expected)
    for finding in found:
        assert finding.fix and finding.because
        assert (finding.price is None) == bool(finding.unpriced)
        assert price_text(finding)


RECORDED = {
    "ci-2core": ["memory-too-small"],
    "container-16gb": ["memory-limit", "cpu-limit", "memory-too-small"],
    "dgx-spark": [],
    "dual-3090-128gb": ["gpu-link", "gpu-link"],
    "epyc-12ch-cpu": [],
    "laptop-8gb": ["memory-too-small"],
    "macbook-m4-max": [],
    "rtx3060-32gb": ["memory-too-small", "gpu-link"],
    "rtx3090-96gb": [],
    "rtx4070-64gb": [],
    "rtx4090-64gb": [],
    "rtx4090-rtx3060": ["gpu-link"],
    "rtx5080-128gb": [],
    "rx7900xtx-64gb": [],
    "strix-halo-128gb": [],
}


@pytest.mark.parametrize("name", list_profiles())
def test_recorded_machines_have_exactly_these_findings(name: str) -> None:
    assert ids(examine(case(load_machine(name)))) == RECORDED[name]


ENGINES: list[tuple[EngineFacts, dict[str, Any], list[str]]] = [
    (ENGINE, {}, []),
    (replace(ENGINE, build=None), {}, ["engine-missing"]),
    (replace(ENGINE, expected=False, build="llama-cpp-python 0.3.40+cu128 (a fork)"), {}, ["engine-other"]),
    (replace(ENGINE, claimants=("llama-cpp-python 0.3.36", "other 1.0")), {}, ["engine-conflict"]),
    (replace(ENGINE, backends=("cpu", "rpc")), {"backends": ("cpu", "rpc")}, ["engine-without-gpu"]),
    (replace(ENGINE, backends=("cpu", "hip", "rpc")), {"backends": ("cpu", "hip")}, ["engine-without-gpu"]),
    (replace(ENGINE, compiled_sets=("avx2",)), {"compiled_sets": ("avx2",)}, ["engine-for-another-cpu"]),
    (
        replace(ENGINE, compiled_sets=("amx_int8", "avx2", "avx512_vnni", "avx512f", "avx_vnni")),
        {},
        ["engine-crashes-here"],
    ),
    (replace(ENGINE, dies_of_instruction=True), {}, ["engine-crashes-here"]),
    (replace(ENGINE, safe_layout="experts"), {}, ["amx-crash"]),
    (ENGINE, {"wishes": Wishes(load_mode="mmap")}, ["mmap-with-overrides"]),
    (ENGINE, {"threads": 32}, ["threads-all-logical"]),
]


@pytest.mark.parametrize(("engine", "here", "expected"), ENGINES)
def test_a_fault_of_the_engine_or_its_settings_is_found(
    engine: EngineFacts, here: dict[str, Any], expected: list[str]
) -> None:
    assert ids(examine(case(load_machine(BOX), engine=engine, here=here))) == expected


def test_a_card_that_the_engine_should_drive_but_does_not_list_is_found() -> None:
    unseen = changed("gpu", index=None)
    (finding,) = examine(case(unseen, engine=ENGINE, here={"backends": ENGINE.backends}))
    assert finding.id == "engine-does-not-see-gpu"
    assert finding.price is not None and finding.price.worst < -0.2


def test_a_card_of_unknown_memory_is_told_without_a_price() -> None:
    arc = changed("gpu", index=None, kind="sycl", vram_total_bytes=None, vram_free_bytes=None)
    (finding,) = examine(case(arc, engine=ENGINE, here={"backends": ENGINE.backends}))
    assert finding.id == "engine-without-gpu" and finding.unpriced


def test_a_variable_that_reaches_the_engine_is_worse_than_one_that_does_not() -> None:
    variables = (Variable("OLLAMA_HOST", "of others", False), Variable("GGML_CUDA_X", "of ours", True))
    found = examine(case(load_machine(BOX), engine=ENGINE, variables=variables))
    assert [(one.level, one.what) for one in found] == [
        ("warning", "GGML_CUDA_X is set"),
        ("info", "OLLAMA_HOST is set"),
    ]


def only(machine: Machine, **about: Any) -> Finding:
    (finding,) = examine(case(machine, engine=ENGINE, **about))
    return finding


def test_the_price_of_a_missing_channel_is_that_of_half_the_bandwidth() -> None:
    half = changed("memory", channels=1, channels_max=2, rated_bandwidth_bps=38_400_000_000)
    price = only(half).price
    assert price is not None and price.decode.now is not None and price.decode.mended is not None
    assert price.decode.mended == case(load_machine(BOX)).now.prediction.decode_tps
    assert price.decode.now == case(half).now.prediction.decode_tps
    assert -0.5 < (price.decode.share or 0) < -0.2
    assert "decode −" in price_text(only(half)) and f"t/s for {MODEL}" in price_text(only(half))


def test_a_slow_link_costs_prefill_and_not_decode() -> None:
    price = only(changed("gpu", pcie_gen_loaded=4, pcie_width_loaded=4)).price
    assert price is not None
    assert (price.prefill.share or 0) < -0.5
    assert price.decode.share == 0


def test_a_limit_that_keeps_the_model_out_is_priced_as_what_would_run() -> None:
    found = examine(case(changed("memory", limit_bytes=16 * GIB, usable_bytes=15 * GIB)))
    price = next(one.price for one in found if one.id == "memory-limit")
    assert price is not None and price.decode.now is None and price.decode.mended is not None
    assert price.worst == -1.0
    text = price_text(next(one for one in found if one.id == "memory-limit"))
    assert "once it fits" in text


def test_a_limit_that_is_not_what_keeps_the_model_out_promises_nothing() -> None:
    narrow = changed("memory", limit_bytes=60 * GIB, available_bytes=20 * GIB, usable_bytes=20 * GIB)
    price = next(one.price for one in examine(case(narrow)) if one.id == "memory-limit")
    assert price is not None and price.worst == 0


def test_a_board_of_an_older_generation_has_no_remedy() -> None:
    finding = only(changed("gpu", pcie_gen_max=4, pcie_gen_card_max=5, pcie_gen_slot_max=4))
    assert finding.level == "info" and "generation 4" in finding.because


def test_pinned_memory_is_limited_for_drivers_that_count_it() -> None:
    radeon = load_machine("rx7900xtx-64gb")
    narrow = replace(radeon, memory=replace(radeon.memory, locked_limit_bytes=8 * MIB))
    (finding,) = examine(case(narrow))
    assert finding.id == "locked-memory" and finding.price is not None
    assert "if the driver then refuses to pin" in price_text(finding)


def test_a_card_slower_than_the_cpu_is_no_reason_to_build_the_engine_again() -> None:
    old = changed("gpu", rated_bandwidth_bps=5_000_000_000, vram_total_bytes=2 * GIB, vram_free_bytes=2 * GIB)
    without = replace(ENGINE, backends=("cpu", "rpc"))
    assert ids(examine(case(old, engine=without, here={"backends": ("cpu", "rpc")}))) == []


def test_an_apple_engine_may_use_what_the_system_does_not_list() -> None:
    mac = replace(load_machine("macbook-m4-max"), os="darwin", arch="arm64")
    compiled = ("dotprod", "fp16", "i8mm", "neon", "sme")
    metal = replace(ENGINE, backends=("cpu", "metal"), compiled_sets=compiled)
    assert ids(examine(case(mac, engine=metal))) == []


def test_what_the_user_names_is_the_budget_that_prices_rest_on() -> None:
    box = load_machine(BOX)
    assert ids(examine(case(box, here={"ram": 8 * GIB}))) == ["memory-too-small"]
    small = case(box, here={"vram": 4 * GIB}).now.prediction.decode_tps
    large = case(box).now.prediction.decode_tps
    assert small is not None and large is not None and small.mid < large.mid


def test_a_model_the_user_named_and_cannot_run_is_an_error() -> None:
    small = changed("memory", usable_bytes=6 * GIB)
    assert only(small).level == "warning"
    assert only(small, named=True).level == "error"


def test_a_model_that_is_here_needs_no_room_for_its_download() -> None:
    assert ids(examine(case(changed("disk", free_bytes=GIB), on_disk=True))) == []


def test_powersave_is_normal_where_the_driver_follows_the_energy_preference() -> None:
    machine = changed("cpu", governor="powersave", power_profile="balance_performance")
    sources = {**machine.sources, "cpu.governor": "cpufreq scaling_governor, driver amd-pstate-epp"}
    assert ids(examine(case(replace(machine, sources=sources)))) == []


def test_the_worst_comes_first() -> None:
    box = changed("memory", channels=1, channels_max=2, speed_mtps=5600, speed_max_mtps=6000)
    box = replace(box, gpus=(replace(box.gpus[0], pcie_gen_loaded=3, pcie_width_loaded=4),))
    found = examine(case(box, engine=replace(ENGINE, dies_of_instruction=True)))
    assert found[0].level == "error"
    worst = [one.price.worst for one in found if one.level == "warning" and one.price]
    assert worst == sorted(worst) and len(worst) >= 2


def test_a_machine_of_which_little_or_nothing_is_known_is_examined_all_the_same() -> None:
    known = Machine(memory=replace(Machine().memory, total_bytes=64 * GIB))
    assert ids(examine(case(known))) == []
    assert ids(examine(case(Machine()))) == ["memory-unknown"]
