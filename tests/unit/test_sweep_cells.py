"""What a sweep tries: which cells there are, which are refused and why; that they survive being stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest

from qnext.config import find_paths
from qnext.errors import UsageError
from qnext.pipeline.planning import PlannedModel, plan_model
from qnext.pipeline.request import Request
from qnext.pipeline.sweep_cells import BOUND_THREADS, MOST_CELLS, OFFLOAD_VARIABLE, loads_of, make_cells
from qnext.pipeline.sweep_setup import default_placement
from qnext.pipeline.sweep_values import (
    Cell,
    Grid,
    RungSize,
    SweepSettings,
    cell_from_dict,
    cell_to_dict,
    settings_from_dict,
    settings_to_dict,
)
from qnext.plan.placement import check_placement
from qnext.plan.values import Override, Workload
from qnext.units import MIB

pytestmark = pytest.mark.usefixtures("demo_model")


@cache
def planned(hardware: str, vram: int | None = None, **wishes: object) -> tuple[PlannedModel, Request]:
    request = Request(model="demo", hardware=hardware, context=1024, vram=vram, **wishes)  # type: ignore[arg-type]
    return plan_model(request, find_paths(), print), request


def cells(
    hardware: str = "ci-2core",
    vram: int | None = None,
    grid: Grid | None = None,
    crashes: dict[str, str] | None = None,
    **wishes: object,
) -> tuple[Cell, ...]:
    plan, request = planned(hardware, vram, **wishes)
    crashes = crashes or {}
    defaults = default_placement(plan, request, crashes)
    return make_cells(
        plan, objective="turn", grid=grid or Grid(), fit=None, defaults=defaults, crashes=crashes
    )


def live(made: tuple[Cell, ...]) -> list[Cell]:
    return [cell for cell in made if not cell.status]


SOME: list[Callable[[], tuple[Cell, ...]]] = [
    cache(lambda: cells()),
    cache(lambda: cells("rtx4090-64gb", 12 * MIB)),
    cache(lambda: cells("rtx4090-64gb", 24 * MIB)),
    cache(lambda: cells("rtx4090-rtx3060", 10 * MIB)),
]


@pytest.mark.parametrize("make", SOME)
def test_baselines_come_first_and_names_and_configurations_are_all_different(
    make: Callable[[], tuple[Cell, ...]],
) -> None:
    made = make()
    assert made[0].name == "plan" and "plan" in made[0].roles and not made[0].status
    assert len({cell.name for cell in made}) == len(made)
    asked = [(cell.placement, tuple(cell.environment.items())) for cell in live(made)]
    assert len(set(asked)) == len(asked)
    assert len(live(made)) <= MOST_CELLS and loads_of(made) <= 12
    assert all(not cell.roles for cell in made if cell.status), "what cannot run is no baseline"


@pytest.mark.parametrize(("hardware", "vram"), [("ci-2core", None), ("rtx4090-64gb", 12 * MIB)])
def test_what_is_run_fits_by_arithmetic_and_what_is_refused_says_what_it_lacks(
    hardware: str, vram: int | None
) -> None:
    plan, _ = planned(hardware, vram)
    bare = replace(plan.problem, compute=None)
    made = cells(hardware, vram)
    assert all(check_placement(bare, cell.placement).fits for cell in live(made) if not cell.roles)
    for cell in made:
        if cell.status == "does-not-fit":
            assert not check_placement(bare, cell.placement).fits
            assert "missing, by arithmetic" in cell.because and "iB on " in cell.because
    assert vram is None or any(cell.status == "does-not-fit" for cell in made)


def test_more_experts_on_the_gpu_come_later_and_share_no_load_with_fewer() -> None:
    made = live(cells("rtx4090-64gb", 12 * MIB))
    orders: dict[str, set[int]] = {}
    for cell in made:
        orders.setdefault(cell.group, set()).add(cell.order)
    assert all(len(order) == 1 for order in orders.values())
    assert len({cell.order for cell in made}) > 2, "several shares of experts are tried"


def test_the_offload_threshold_is_tried_in_children_of_its_own_and_only_with_a_gpu() -> None:
    made = live(cells("rtx4090-64gb", 12 * MIB))
    with_threshold = [cell for cell in made if OFFLOAD_VARIABLE in cell.environment]
    assert with_threshold
    assert {cell.group for cell in with_threshold}.isdisjoint(
        {cell.group for cell in made if not cell.environment}
    )
    assert not any(cell.environment for cell in cells())


def test_threads_are_bound_to_cores_where_cores_differ_or_the_user_asks() -> None:
    assert not any(cell.environment for cell in cells()), "two cores alike: nothing to win"
    plan, request = planned("ci-2core")
    cpu = replace(plan.surroundings.machine.cpu, performance_cores=6, efficiency_cores=8)
    machine = replace(plan.surroundings.machine, cpu=cpu)
    hybrid = replace(plan, surroundings=replace(plan.surroundings, machine=machine))
    defaults = default_placement(hybrid, request, {})
    made = make_cells(hybrid, objective="turn", grid=Grid(), fit=None, defaults=defaults, crashes={})
    made = live(made)
    bound = [cell for cell in made if cell.environment]
    assert bound and all(cell.environment == BOUND_THREADS for cell in bound)
    assert {cell.knobs["affinity"] for cell in bound} == {"cores"}
    assert {cell.group for cell in bound}.isdisjoint({cell.group for cell in made if not cell.environment})
    asked = live(cells(grid=Grid(affinity=("cores",))))
    assert {bool(cell.environment) for cell in asked if not cell.roles} == {True}


def test_a_layout_known_to_crash_is_refused_with_what_happened_and_never_a_baseline() -> None:
    said = "the engine crashed with weights in AMX buffers (SIGSEGV)"
    made = cells(crashes={"full": said}, repack="experts")
    refused = [cell for cell in made if cell.status == "crashed"]
    assert refused and all(said in cell.because for cell in refused)
    assert not any(cell.placement.extra_buffers for cell in live(made))
    assert any("fit" in cell.roles for cell in live(made)), "llama.cpp's choice runs with another layout"


def test_without_gpu_llama_cpps_own_choice_is_all_on_the_cpu_as_it_comes() -> None:
    made = cells()
    fit = next(cell for cell in made if "fit" in cell.roles)
    assert "defaults" in fit.roles
    assert fit.placement.extra_buffers and fit.placement.load_mode == "mmap"
    assert (fit.placement.batch, fit.placement.ubatch, fit.placement.kv_type_k) == (2048, 512, "f16")


def test_a_grid_with_several_values_tries_just_those_beside_the_baselines() -> None:
    made = cells(grid=Grid(ubatch=(128, 256), kv_type_k=("f16", "q8_0")))
    tried = {
        (cell.placement.ubatch, cell.placement.kv_type_k, cell.placement.kv_type_v)
        for cell in made
        if not cell.roles
    }
    assert tried == {(ub, kv, kv) for ub in (128, 256) for kv in ("f16", "q8_0")}
    assert {cell.placement.threads for cell in made if not cell.roles} == {made[0].placement.threads}


def test_one_value_pins_a_knob_and_leaves_the_others_to_be_tried() -> None:
    made = cells(grid=Grid(ubatch=(256,)), ubatch=256)
    assert {cell.placement.ubatch for cell in made if not cell.roles} == {256}
    assert {cell.placement.flash_attention for cell in made if not cell.roles} == {"on", "off"}


def test_a_quantised_cache_is_tried_with_flash_attention_alone_and_not_where_quality_is_wished() -> None:
    made = cells()
    assert {c.placement.flash_attention for c in made if c.placement.kv_type_v == "q8_0"} == {"on"}
    assert {cell.placement.kv_type_k for cell in cells(prefer="quality")} == {"f16"}


def test_a_layout_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="not a layout"):
        cells(grid=Grid(repack=("full", "sideways")))


@pytest.mark.parametrize("make", SOME)
def test_a_stored_cell_is_the_same_when_read_again(make: Callable[[], tuple[Cell, ...]]) -> None:
    for cell in make():
        text = json.dumps(cell_to_dict(cell))
        again = cell_from_dict(cell.name, json.loads(text), cell.status, cell.because)
        assert again == cell and again.group == cell.group


def test_stored_settings_are_the_same_when_read_again() -> None:
    request = Request(
        model="demo",
        workload=Workload(1, 2, 3),
        overrides=(Override("exps", "CPU"),),
        tensor_split=(1.0, 2.0),
        device_memory={"RPC0": 5},
        rpc_servers=("127.0.0.1:50052",),
    )
    sizes = RungSize(512, 24, 0)
    settings = SweepSettings(request, "turn", 60.0, 30, 10, sizes, replace(sizes, depth=9), 1.5, 7)
    assert settings_from_dict(json.loads(json.dumps(settings_to_dict(settings)))) == settings
