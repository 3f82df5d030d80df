"""A changed machine differs in what was changed and in what follows from it, and in nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qnext.errors import UsageError
from qnext.hardware.machine import Cpu, Gpu, Machine, Memory, facts
from qnext.plan.budgets import make_budgets
from qnext.plan.machine_speeds import link_rate, machine_speeds
from qnext.plan.what_if import KEYS, SOURCE, with_changes
from qnext.units import GIB

CARD = Gpu(
    name="a card",
    kind="cuda",
    index=0,
    pci_bus_id="0000:01:00.0",
    vram_total_bytes=16 * GIB,
    vram_free_bytes=15 * GIB,
    rated_bandwidth_bps=960 * 10**9,
    pcie_gen_loaded=5,
    pcie_width_loaded=16,
    h2d_pinned_bps=50 * 10**9,
)
DESK = Machine(
    cpu=Cpu(physical_cores=8, logical_cores=16, usable_cores=4, quota_cores=4.0, instruction_sets=("avx2",)),
    memory=Memory(
        total_bytes=64 * GIB,
        limit_bytes=48 * GIB,
        available_bytes=50 * GIB,
        usable_bytes=40 * GIB,
        rated_bandwidth_bps=80 * 10**9,
        measured_bandwidth_bps=60 * 10**9,
        bandwidth_by_threads=((1, 20), (4, 60)),
    ),
    gpus=(CARD,),
    sources={"gpus.0.vram_total_bytes": "NVML", "cpu.model": "/proc/cpuinfo"},
)


def different(one: Machine, other: Machine) -> set[str]:
    """Paths of the facts in which two machines differ."""
    before, after = dict(facts(one)), dict(facts(other))
    return {path for path in before | after if path != "gpus" and before.get(path) != after.get(path)}


def test_what_is_in_use_stays_in_use() -> None:
    changed, said = with_changes(DESK, "vram=24G,ram=128G")
    assert changed.gpus[0].vram_free_bytes == 23 * GIB
    assert changed.memory.usable_bytes == 120 * GIB  # 8 of the 48 allowed were taken
    assert changed.memory.limit_bytes is None
    assert said == ("ram 48.00 GiB → 128.00 GiB", "vram 16.00 GiB → 24.00 GiB")


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("vram=24G", {"gpus.0.vram_total_bytes", "gpus.0.vram_free_bytes"}),
        ("gpu_bandwidth=1.8T", {"gpus.0.rated_bandwidth_bps"}),
        (
            "ram=128G",
            {f"memory.{name}_bytes" for name in ("total", "limit", "available", "usable")},
        ),
    ],
)
def test_nothing_else_changes_and_each_change_names_its_source(text: str, paths: set[str]) -> None:
    changed, _ = with_changes(DESK, text)
    assert different(DESK, changed) == paths
    assert all(SOURCE in changed.sources[path] for path in paths)
    assert changed.sources["cpu.model"] == "/proc/cpuinfo"


def test_measured_rate_follows_the_rating_and_the_sweep_is_forgotten() -> None:
    memory = with_changes(DESK, "ram_bandwidth=100G")[0].memory
    assert (memory.rated_bandwidth_bps, memory.measured_bandwidth_bps) == (100 * 10**9, 75 * 10**9)
    assert memory.bandwidth_by_threads is None


def test_measured_rate_without_a_rating_is_forgotten() -> None:
    unrated = replace(DESK, memory=replace(DESK.memory, rated_bandwidth_bps=None))
    changed, _ = with_changes(unrated, "ram_bandwidth=100G")
    assert machine_speeds(changed).ram_bps == 80 * 10**9


def test_a_link_forgets_what_was_measured_on_the_old_one() -> None:
    changed, said = with_changes(DESK, "pcie=4x8")
    assert link_rate(changed.gpus[0]) == 16 * 10**9
    assert said == ("pcie 5x16 → 4x8 (16 GB/s)",)


def test_cores_keep_their_threads_and_lose_the_quota() -> None:
    cpu = with_changes(DESK, "cores=12")[0].cpu
    assert (cpu.usable_cores, cpu.logical_cores, cpu.usable_logical_cores, cpu.quota_cores) == (
        12,
        24,
        24,
        None,
    )


def test_gpus_are_taken_away_repeated_and_imagined() -> None:
    assert with_changes(DESK, "gpus=0")[0].gpus == ()
    two, _ = with_changes(DESK, "gpus=2,vram.1=8G")
    budgets = {budget.name: budget.budget_bytes for budget in make_budgets(two)}
    assert budgets["CUDA0"] > budgets["CUDA1"] > 0
    bare = replace(DESK, gpus=())
    bought, _ = with_changes(bare, "gpus=1,vram=32G,pcie=5x16,gpu_bandwidth=1.8T")
    assert {budget.name for budget in make_budgets(bought)} == {"CPU", "CUDA0"}


def test_changes_of_gpus_come_after_their_number_in_any_order() -> None:
    assert with_changes(DESK, "vram.1=8G,gpus=2")[0] == with_changes(DESK, "gpus=2,vram.1=8G")[0]


def test_shared_memory_grows_with_the_ram() -> None:
    shared = replace(DESK, unified_memory=True)
    before, after = (
        {budget.name: budget.budget_bytes for budget in make_budgets(machine)}
        for machine in (shared, with_changes(shared, "ram=128G")[0])
    )
    assert after["CUDA0"] > 2 * before["CUDA0"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("vrm=24G", "vram"),
        ("colour=red", "ram_bandwidth"),
        ("vram", "--what-if"),
        ("vram=", "--what-if"),
        ("", "--what-if"),
        (",", "--what-if"),
        ("vram=much", "24G"),
        ("vram=-4G", "24G"),
        ("vram=4", "24G"),
        ("ram=0", "24G"),
        ("cores=0", "1 to 1024"),
        ("cores=²", "1 to 1024"),
        ("gpus=99", "0 to 16"),
        ("pcie=4", "pcie=4x16"),
        ("pcie=9x16", "pcie=4x16"),
        ("pcie=4x3", "pcie=4x16"),
        ("ram_bandwidth=90", "90G"),
        ("ram_bandwidth=fast", "90G"),
        ("vram=8G,vram=9G", "once"),
        ("vram=8G,vram.0=9G", "once"),
        ("vram.1=8G", "last one is 0"),
        ("ram.1=8G", "from 0"),
        ("vram.x=8G", "from 0"),
        ("gpus=0,vram=8G", "gpus=0"),
    ],
)
def test_what_is_not_understood_is_refused_with_what_would_be(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        with_changes(DESK, text)
    assert words in caught.value.hint


@pytest.mark.parametrize("key", ["vram=8G", "pcie=4x16", "gpu_bandwidth=1T", "gpus=1,pcie=4x16"])
def test_a_machine_without_gpus_is_told_how_to_imagine_one(key: str) -> None:
    with pytest.raises(UsageError) as caught:
        with_changes(replace(DESK, gpus=()), key)
    assert "vram" in caught.value.hint


def test_every_key_is_named_in_the_help() -> None:
    from qnext.cli.plan import plan

    help_text = plan.__signature__.parameters["what_if"].annotation.__metadata__[0].help  # type: ignore[attr-defined]
    assert all(f"{key}=" in help_text for key in KEYS)
