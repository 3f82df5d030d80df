"""A race ends with a configuration that is not slower than the baselines, within its time and its loads."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import cache
from math import exp
from statistics import mean

import pytest

from qnext.bench.race_values import Arm, Outcome, Step, excluded_arms
from qnext.bench.racing import Race
from qnext.errors import UsageError
from tests.race_machine import Finish, Machine, run_race

SEEDS = range(1)


@cache
def races() -> tuple[Finish, ...]:
    """`race-finds-best` in claims/ runs 200 of them; these few are for the rules that hold for every one."""
    return tuple(run_race(seed) for seed in SEEDS)


def small_arms() -> list[Arm]:
    """12 cells in two groups; the baseline is the slowest predicted."""
    return [
        Arm(
            f"t{threads} ub{ubatch} ncmoe{layers}",
            group=f"ncmoe{layers}",
            order=-layers,
            knobs={"threads": threads, "ubatch": ubatch, "n_cpu_moe": layers},
            predicted_s=(8.0, 10.0, 12.5),
            demands={"ubatch": ubatch, "gpu_layers": -layers},
            baseline=(threads, ubatch, layers) == (4, 256, 20),
        )
        for layers in (20, 10)
        for ubatch in (256, 512)
        for threads in (4, 8, 16)
    ]


def true_seconds(arm: str) -> float:
    threads, ubatch, layers = arm.split()
    return (
        10.0
        * {"t4": 1.0, "t8": 0.8, "t16": 0.9}[threads]
        * {"ub256": 1.0, "ub512": 0.9}[ubatch]
        * {"ncmoe20": 1.0, "ncmoe10": 0.85}[layers]
    )


def answer(step: Step, chance: random.Random) -> Outcome:
    seconds = true_seconds(step.arm) * chance.lognormvariate(0, 0.03)
    return Outcome("ok", round(seconds * 1e9), seconds * (1 if step.rung == "full" else 0.2) + 5 * step.load)


def finish(race: Race, chance: random.Random, failures: dict[str, str] | None = None) -> list[Step]:
    steps = []
    while (step := race.next()) is not None:
        steps.append(step)
        status = (failures or {}).get(step.arm)
        race.observe(step, Outcome(status, None, 3.0) if status else answer(step, chance))  # type: ignore[arg-type]
    return steps


def test_winners_are_near_the_best_of_the_grid() -> None:
    assert mean(race.of_best for race in races()) >= 0.98


@pytest.mark.parametrize("seed", SEEDS)
def test_a_winner_is_not_slower_than_the_baselines(seed: int) -> None:
    assert races()[seed].against_baseline >= 0.98


@pytest.mark.parametrize("seed", SEEDS)
def test_a_race_keeps_its_time_and_its_loads(seed: int) -> None:
    """A fifth of the grid, but for the last step; loads beside those that replace a dead engine."""
    assert races()[seed].of_grid <= 0.205
    assert races()[seed].loads <= 10


def test_of_equal_arms_the_baseline_wins() -> None:
    race, chance = Race(small_arms(), seconds=200, seed=1), random.Random(1)
    while (step := race.next()) is not None:
        race.observe(step, Outcome("ok", round(10e9 * chance.lognormvariate(0, 0.05)), 2.0))
    result = race.result()
    assert result.winner == result.against == "t4 ub256 ncmoe20"
    assert result.verdict is not None and result.verdict.word == "no difference shown"


def test_every_arm_is_accounted_for_and_only_measured_ones_are_ranked() -> None:
    for race in races():
        words = {standing.word for standing in race.result.standings}
        assert len(race.result.standings) == 150
        assert [one.arm for one in race.result.standings if one.word == "winner"] == [race.result.winner]
        assert all(one.because for one in race.result.standings if one.word != "winner")
        assert all(one.measured for one in race.result.standings if one.word in ("slower", "contender"))
        assert words <= {
            *("winner", "contender", "slower", "cannot-win", "not-reached"),
            *("does-not-fit", "out-of-memory", "crashed"),
        }


def test_a_race_finds_the_best_of_a_small_grid_and_shows_it() -> None:
    race = Race(small_arms(), seconds=600, seed=1)
    finish(race, random.Random(1))
    result = race.result()
    assert result.winner == "t8 ub512 ncmoe10"
    assert result.verdict is not None and result.verdict.word == "faster"
    assert result.verdict.ratio == pytest.approx(0.612, rel=0.05)


def test_without_time_to_compare_the_baseline_stays() -> None:
    race = Race(small_arms(), seconds=18, seed=1)
    finish(race, random.Random(1))
    result = race.result()
    assert result.winner == result.against == "t4 ub256 ncmoe20"
    assert result.verdict is None
    assert race.spent_s < 36


def roomy_arms() -> list[Arm]:
    return [replace(arm, host_bytes=1) for arm in small_arms()]


def test_models_with_room_at_once_are_loaded_once_and_measured_side_by_side() -> None:
    race = Race(roomy_arms(), seconds=600, seed=1, room=2)
    steps = finish(race, random.Random(1))
    assert race.result().winner == "t8 ub512 ncmoe10"
    assert race.loads == 2 and steps[0].also is not None and not any(step.load for step in steps[1:])
    for step in steps:
        if step.partner is not None:
            other = steps[step.number + 1]
            assert (other.arm, other.partner, other.load) == (step.partner, None, False)
            assert other.group != step.group and not step.load
    duel = [step for step in steps if step.rung == "full"]
    assert [step.partner is not None for step in duel] == [True, False] * (len(duel) // 2)


def test_what_slows_two_measured_at_once_does_not_hide_which_is_faster() -> None:
    """Each moment is up to a half slower or faster than the one before; the difference is 4 %."""
    arms = [replace(arm, host_bytes=1) for arm in small_arms() if arm.knobs["ubatch"] == 256]
    winners = []
    for seed in range(10):
        race, chance, mood = Race(arms, seconds=300, seed=seed, room=2), random.Random(seed), 0.0
        second = False
        while (step := race.next()) is not None:
            mood = mood if second else chance.gauss(0, 0.25)
            second = step.partner is not None
            own = 0.96 if step.group == "ncmoe10" else 1.0
            took = 10e9 * own * exp(mood + chance.gauss(0, 0.01))
            race.observe(step, Outcome("ok", round(took), 2.0 + 5 * step.load))
        winners.append(race.result().winner or "")
    assert sum(winner.endswith("ncmoe10") for winner in winners) >= 9


def test_what_dies_beside_another_model_is_tried_again_alone() -> None:
    race, loaded = Race(roomy_arms(), seconds=600, seed=1, room=2), set[str]()
    died = []
    while (step := race.next()) is not None:
        if step.load:
            loaded = {group for group in loaded if group in step.keep} | {step.group}
            loaded |= {step.also.split()[-1]} if step.also else set()
        if len(loaded) > 1:
            died.append(step.arm)
            loaded = set()
            race.observe(step, Outcome("out-of-memory", None, 3.0))
        else:
            race.observe(step, answer(step, random.Random(step.number)))
    assert len(died) == 1
    assert all(standing.word != "out-of-memory" for standing in race.result().standings)
    assert race.result().winner == "t8 ub512 ncmoe10"
    assert race.loads <= 10


def test_a_baseline_is_not_given_up_for_what_killed_others() -> None:
    arms = [replace(arm, baseline=arm.name == "t16 ub512 ncmoe10") for arm in small_arms()]
    dead = {i: "crashed" for i, arm in enumerate(arms) if arm.name.endswith("ncmoe10") and i % 3 < 2}
    excluded = excluded_arms(arms, dead, ran=set())  # type: ignore[arg-type]
    assert [arm.name for i, arm in enumerate(arms) if i not in excluded and arm.baseline]


def test_the_baseline_and_the_challenger_are_measured_in_full() -> None:
    race = Race(small_arms(), seconds=600, seed=1)
    steps = finish(race, random.Random(1))
    full = {step.arm for step in steps if step.rung == "full"}
    assert full == {"t4 ub256 ncmoe20", race.result().winner}


def test_a_race_resumes_at_any_moment_with_the_steps_it_would_have_taken() -> None:
    whole = Race(small_arms(), seconds=200, seed=5)
    steps = finish(whole, random.Random(2))
    outcomes = whole.state()["outcomes"]
    for cut in range(0, len(steps), 7):
        state = json.loads(json.dumps({**whole.state(), "outcomes": outcomes[:cut]}))
        assert Race.restore(small_arms(), state).next() == steps[cut]
    assert Race.restore(small_arms(), whole.state()).result() == whole.result()


def test_a_race_is_resumed_between_the_two_of_a_pair_too() -> None:
    whole = Race(roomy_arms(), seconds=200, seed=5, room=2)
    steps = finish(whole, random.Random(2))
    state = whole.state()
    cut = next(step.number for step in steps if step.partner) + 1
    again = Race.restore(roomy_arms(), {**state, "outcomes": state["outcomes"][:cut]})
    assert again.next() == steps[cut]


def test_observations_of_another_sweep_are_refused() -> None:
    race = Race(small_arms(), seconds=200, seed=5)
    finish(race, random.Random(2))
    with pytest.raises(UsageError, match="another way"):
        Race.restore(small_arms()[:-1], {**race.state(), "seed": 6})


def test_a_step_that_was_not_asked_for_is_refused() -> None:
    race = Race(small_arms(), seconds=200)
    with pytest.raises(ValueError, match="not asked"):
        race.observe(Step(7, "other", "other", "short", False), Outcome("ok", 1, 1.0))


def test_cells_limit_how_many_arms_are_measured() -> None:
    race = Race(small_arms(), seconds=150, cells=4, seed=1)
    assert len({step.arm for step in finish(race, random.Random(1))}) <= 4 + 1


def test_what_needs_more_than_an_arm_out_of_memory_is_never_tried() -> None:
    race = Race(small_arms(), seconds=600, seed=1)
    failures = {f"t{threads} ub512 ncmoe10": "out-of-memory" for threads in (4, 8, 16)}
    steps = finish(race, random.Random(1), failures)
    assert sum(step.arm in failures for step in steps) <= 1
    assert race.result().winner == "t8 ub256 ncmoe10"


def test_two_deaths_stop_what_shares_two_levels_and_three_what_shares_one_unless_it_ran() -> None:
    arms = small_arms()
    two = excluded_arms(arms, {3: "crashed", 4: "hung"}, ran=set())
    assert set(two) == {3, 4, 5}
    assert "ubatch 512" in two[5][1]
    assert set(excluded_arms(arms, {3: "crashed", 4: "hung", 9: "crashed"}, ran={0})) == {3, 4, 5, 9, 10, 11}
    assert set(excluded_arms(arms, {3: "crashed", 4: "hung"}, ran={5})) == {3, 4}


def test_one_death_stops_one_arm() -> None:
    assert set(excluded_arms(small_arms(), {3: "crashed"}, ran=set())) == {3}


def test_a_grid_that_was_asked_for_is_measured_whole_whatever_dies_in_it() -> None:
    """Two engines dead with the same two levels stop a third such arm, but not in a grid."""
    dead = {"t4 ub512 ncmoe20": "crashed", "t8 ub512 ncmoe20": "hung"}
    race = Race(small_arms(), seconds=600, seed=1, cover=True)
    steps = finish(race, random.Random(1), dead)
    assert {step.arm for step in steps} == {arm.name for arm in small_arms()}
    assert race.result().winner == "t8 ub512 ncmoe10"
    assert race.loads <= race.max_loads
    words = {one.arm: one.word for one in race.result().standings}
    assert {words[name] for name in dead} == {"crashed", "hung"}
    assert {word for name, word in words.items() if name not in dead} <= {"winner", "contender", "slower"}


def test_a_grid_too_large_for_its_time_keeps_the_time() -> None:
    race = Race(small_arms(), seconds=30, seed=1, cover=True)
    steps = finish(race, random.Random(1))
    assert len({step.arm for step in steps}) < len(small_arms())
    assert race.spent_s < 80, "exploring kept its share; a duel of the fewest pairs came after"
    assert any(one.word in ("not-reached", "cannot-win") for one in race.result().standings)


def test_a_race_goes_on_when_cells_crash_hang_and_run_out_of_memory() -> None:
    """Ten bad cells of 150, drawn: the rest is raced, and each bad one that was met is explained."""

    def tamper(machine: Machine) -> None:
        names = [name for name in machine.true if name not in machine.baselines and name not in machine.bad]
        chosen = random.Random(9).sample(names, 10)
        for name, status in zip(chosen, ["crashed", "hung", "too-slow", "noisy", "crashed"] * 2, strict=True):
            machine.bad[name] = status  # type: ignore[assignment]

        machine.budget_s *= 0.3

    race = run_race(3, tamper=tamper)
    assert race.against_baseline >= 0.98
    assert race.of_grid <= 0.08


def test_a_race_whose_baseline_cannot_run_ends_with_the_best_that_can() -> None:
    race = Race(small_arms(), seconds=300, seed=1)
    finish(race, random.Random(1), {"t4 ub256 ncmoe20": "crashed"})
    assert race.result().winner == "t8 ub512 ncmoe10"
    assert race.result().verdict is None


def test_a_race_in_which_nothing_runs_has_no_winner() -> None:
    race = Race(small_arms(), seconds=300, seed=1)
    finish(race, random.Random(1), {arm.name: "crashed" for arm in small_arms()})
    assert race.result().winner is None


def test_arms_need_a_baseline_and_names_of_their_own() -> None:
    with pytest.raises(ValueError, match="baseline"):
        Race([], seconds=10)
    with pytest.raises(ValueError, match="different names"):
        Race([*small_arms(), small_arms()[0]], seconds=10)
