"""What would change a plan: each change can be planned as it is told, and saves what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qnext.hardware import Machine, load_machine
from qnext.models.shape import read_shape
from qnext.models.synth.imagined import imagined_header
from qnext.plan.choice import choose_placement, fitting_placements
from qnext.plan.levers import find_levers, runner_up
from qnext.plan.machine_speeds import machine_speeds, thread_counts
from qnext.plan.options import PlanOptions
from qnext.plan.placement import Problem
from qnext.plan.problem import make_problem
from qnext.plan.turn import placed_seconds
from qnext.plan.what_if import with_changes
from qnext.units import GIB, MIB


def problem(machine: Machine, **budgets: int) -> Problem:
    header = imagined_header("qwen3-next-80b-a3b", "Q4_K_M")
    decode, prefill = thread_counts(machine)
    options = PlanOptions(threads=decode, threads_batch=prefill)
    return make_problem(
        header,
        read_shape(header),
        machine,
        options,
        speeds=machine_speeds(machine),
        **budgets,  # type: ignore[arg-type]
    )


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["rtx4070-64gb", "epyc-12ch-cpu", "strix-halo-128gb", "dual-3090-128gb"])
def test_each_lever_can_be_planned_and_saves_what_it_says(name: str) -> None:
    machine = load_machine(name)
    before = placed_seconds(problem(machine), choose_placement(problem(machine)))
    levers = find_levers(machine, problem)
    assert [lever.gain for lever in levers] == sorted((lever.gain for lever in levers), reverse=True)
    for lever in levers:
        changed = problem(with_changes(machine, lever.what_if)[0])
        after = placed_seconds(changed, choose_placement(changed))
        assert 0 < lever.gain < 1 and after == pytest.approx(before * (1 - lever.gain))


def test_a_box_with_one_gpu_is_told_of_memory_vram_and_link() -> None:
    told = {lever.what_if.partition("=")[0] for lever in find_levers(load_machine("rtx4070-64gb"), problem)}
    assert {"ram_bandwidth", "vram.0", "gpus"} <= told


def test_a_model_that_does_not_fit_has_no_levers() -> None:
    assert find_levers(load_machine("laptop-8gb"), problem) == ()


def test_the_runner_up_is_the_second_of_those_weighed() -> None:
    here = problem(load_machine("rtx4070-64gb"))
    ranked = fitting_placements(here)
    second = runner_up(here)
    times = [placed_seconds(here, one) for one in ranked]
    assert second is not None and second.loss == pytest.approx(min(times[1:]) / times[0] - 1)
    assert second.loss >= 0 or "KV cache in q8_0" in second.words
    whole = replace(here, options=replace(here.options, kv_type_k="f16"))
    other = runner_up(whole)
    assert other is not None and other.loss >= 0
    assert f"ubatch {fitting_placements(whole)[1].placement.ubatch:,}" in other.words
    assert runner_up(problem(load_machine("epyc-12ch-cpu"))) is None


def test_headroom_replaces_the_margin_that_is_left() -> None:
    machine = load_machine("rtx4070-64gb")
    usual, tight = problem(machine), problem(machine, ram_headroom=0, vram_headroom=100 * MIB)
    host, gpu = (budget.budget_bytes for budget in tight.budgets)
    assert host == machine.memory.usable_bytes
    assert gpu == (machine.gpus[0].vram_free_bytes or 0) - 100 * MIB
    assert host - usual.budgets[0].budget_bytes == GIB
