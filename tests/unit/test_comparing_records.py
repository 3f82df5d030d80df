"""Faster is said only where the samples and the noise of equal runs allow it; what confounds is named."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import exp
from pathlib import Path
from typing import Any

import pytest

from qnext.bench.names import parse_name
from qnext.bench.statistics import summarise
from qnext.errors import UsageError
from qnext.pipeline.comparing_records import RecordComparison, check_knob, compare_records, find_baseline
from qnext.plan.expert_rules import expert_pattern
from qnext.store.differences import find_differences
from qnext.store.record import EngineIdentity, Identity, Record, TestResult
from qnext.store.results import ResultStore

ENGINE = EngineIdentity("llama-cpp-python", "0.3.36", "0c1e57098", "b1 cpu")
IDENTITY = Identity(
    "sampled-sha256:ab",
    "Q4_K_M",
    ENGINE,
    "m1",
    "p1",
    "w1",
    header_digest="h1",
    model_bytes=1000,
    model_params=2000,
    devices=("CUDA0 RTX 4090",),
    driver="580.1",
    bandwidths={"ram": 80_000_000_000},
    power={"governor": "performance", "on_battery": False},
    environment={},
)
PLACEMENT: dict[str, Any] = {
    "devices": ["CUDA0"],
    "cpu_expert_layers": [],
    "overrides": [],
    "tensor_split": None,
    "ubatch": 512,
    "threads": 6,
    "threads_batch": 12,
    "kv_type_k": "f16",
    "kv_type_v": "f16",
}


def result(name: str, samples: Sequence[int]) -> TestResult:
    test = parse_name(name)
    return TestResult(name, test.prompt, test.generate, 0, tuple(samples), *summarise(samples, test.tokens))


RECORD = Record(
    "aaaa00000000",
    "2026-10-01T12:00:00+00:00",
    "ok",
    "bench",
    "Qwen:Q4_K_M",
    IDENTITY,
    tests=(result("tg128", [1000, 1001, 1002, 1003, 1004]),),
    placement=PLACEMENT,
    machine={"cpu": {"model": "Ryzen 9"}, "gpus": [{"name": "RTX 4090"}]},
    workload={"tests": ["tg128"], "repetitions": 5},
)
OTHER = replace(RECORD, id="bbbb00000000", when="2026-10-02T12:00:00+00:00")


def other(*samples: int, **placement: object) -> Record:
    tests = (result("tg128", samples),) if samples else OTHER.tests
    return replace(OTHER, tests=tests, placement=PLACEMENT | placement)


def word(found: RecordComparison) -> str:
    (test,) = found.tests
    return test.word


def test_a_clear_gain_is_faster_and_its_reverse_slower() -> None:
    quick = other(800, 801, 802, 803, 804)
    there, back = compare_records(RECORD, quick), compare_records(quick, RECORD)
    assert (word(there), word(back)) == ("faster", "slower")
    assert there.tests[0].ratio == pytest.approx(1.2494, abs=1e-3) == 1 / back.tests[0].ratio
    assert there.tests[0].candidate_tps > there.tests[0].baseline_tps


@pytest.mark.parametrize(
    ("samples", "why"),
    [
        ([1000, 1001, 1002, 1003, 1004], ""),
        ([990, 991, 992, 993, 994], "equal runs"),
        ([500, 501, 502], "too few samples"),
        ([600, 700, 1001, 1500, 1600], ""),
    ],
)
def test_otherwise_no_difference_is_shown(samples: list[int], why: str) -> None:
    (test,) = compare_records(RECORD, other(*samples)).tests
    assert test.word == "no difference shown" and why in test.why and bool(why) == bool(test.why)


def test_means_without_samples_show_nothing() -> None:
    blind = replace(result("tg128", [500]), samples_ns=(), mean_ns=500, stddev_ns=1)
    (test,) = compare_records(RECORD, replace(OTHER, tests=(blind,))).tests
    assert (test.word, test.interval, test.why) == ("no difference shown", None, "samples are not known")


def test_equal_runs_on_a_noisy_machine_are_rarely_called_different() -> None:
    """Each run has a speed of its own, which its samples share: they alone would tell most pairs apart."""
    chance = random.Random(3)

    def run(number: int) -> Record:
        centre = 10**8 * exp(chance.gauss(0, 0.08))
        samples = [round(centre * exp(chance.gauss(0, 0.01))) for _ in range(5)]
        return replace(RECORD, id=f"r{number}", tests=(result("tg128", samples),))

    runs = [run(number) for number in range(60)]
    blind = [compare_records(a, b) for a, b in pairwise(runs[19:])]
    assert sum(word(found) != "no difference shown" for found in blind) > 15
    called = [compare_records(runs[i - 1], runs[i], runs[: i - 1]) for i in range(20, 60)]
    assert sum(word(found) != "no difference shown" for found in called) <= 2
    assert not called[-1].tests[0].assumed and blind[0].tests[0].assumed
    twice = replace(run(99), placement=PLACEMENT | {"ubatch": 2048})
    twice = replace(twice, tests=(result("tg128", [4 * 10**7 + i for i in range(5)]),))
    assert word(compare_records(runs[0], twice, runs[1:])) == "faster"


def test_two_runs_of_the_same_have_no_knob() -> None:
    found = compare_records(RECORD, OTHER)
    assert not found.differences.differing and not found.knobs and not found.confounded


def test_one_differing_field_is_the_knob_and_more_confound() -> None:
    one = compare_records(RECORD, other(ubatch=1024))
    assert (one.knobs, one.confounded) == (("ubatch",), ())
    two = compare_records(RECORD, other(ubatch=1024, kv_type_k="q8_0"))
    assert (two.knobs, two.confounded) == ((), ("ubatch", "kv_type"))
    named = compare_records(RECORD, other(ubatch=1024, kv_type_k="q8_0"), knobs=["-ub"])
    assert (named.knobs, named.confounded) == (("ubatch",), ("kv_type",))
    both = compare_records(RECORD, other(ubatch=1024, kv_type_k="q8_0"), knobs=["ubatch", "ctk"])
    assert both.confounded == ()
    wrong = compare_records(RECORD, other(ubatch=1024), knobs=["threads"])
    assert wrong.confounded == ("ubatch",)


def knobs(a: Record, b: Record) -> tuple[str, ...]:
    return find_differences(a, b).knobs


def test_what_is_turned_at_once_is_one_knob() -> None:
    upgraded = replace(ENGINE, version="0.4.0", llama_commit="1234567", build="b2 cpu")
    assert knobs(RECORD, replace(OTHER, identity=replace(IDENTITY, engine=upgraded))) == ("engine",)
    quant = replace(IDENTITY, model_digest="sampled-sha256:cd", header_digest="h2", quant="Q5_K_M")
    assert knobs(RECORD, replace(OTHER, identity=quant)) == ("model",)
    assert knobs(RECORD, other(threads=8, threads_batch=8)) == ("threads",)
    assert knobs(RECORD, other(kv_type_k="q8_0", kv_type_v="q8_0")) == ("kv_type",)
    rule = {"pattern": expert_pattern((4, 5)), "buffer": "CPU"}
    assert knobs(RECORD, other(cpu_expert_layers=[4, 5], overrides=[rule])) == ("experts",)
    own = {"pattern": "output", "buffer": "CPU"}
    assert knobs(RECORD, other(cpu_expert_layers=[4, 5], overrides=[own, rule])) == ("experts", "overrides")
    elsewhere = replace(IDENTITY, machine="m2", driver="570", bandwidths={"ram": 40_000_000_000})
    assert knobs(RECORD, replace(OTHER, identity=elsewhere)) == ("machine",)


@pytest.mark.parametrize(
    ("change", "knob"),
    [
        ({"driver": "570.2"}, "driver"),
        ({"devices": ("CUDA1 RTX 4090",)}, "devices"),
        ({"bandwidths": {"ram": 60_000_000_000}}, "bandwidth"),
        ({"power": {"governor": "powersave", "on_battery": False}}, "power"),
        ({"power": {"governor": "performance", "on_battery": True}}, "power"),
        ({"environment": {"GGML_OP_OFFLOAD_MIN_BATCH": "64"}}, "environment"),
        ({"environment": {"LD_PRELOAD": None}}, "environment"),
    ],
)
def test_what_moves_speeds_unseen_confounds(change: dict[str, Any], knob: str) -> None:
    found = compare_records(
        RECORD, replace(other(ubatch=1024), identity=replace(IDENTITY, **change)), knobs=["ubatch"]
    )
    assert found.confounded == (knob,)


@pytest.mark.parametrize(
    "change",
    [
        {"bandwidths": {"ram": 84_000_000_000}},
        {"engine": replace(ENGINE, llama_commit="0c1e570")},
        {"workload": "w2"},
        {"placement": "p2"},
    ],
)
def test_what_is_the_same_in_other_words_is_no_difference(change: dict[str, Any]) -> None:
    assert not find_differences(RECORD, replace(OTHER, identity=replace(IDENTITY, **change))).differing


def test_a_workload_differs_by_more_than_the_number_of_its_tests() -> None:
    assert not knobs(RECORD, replace(OTHER, workload={"tests": ["tg128", "pp512"], "repetitions": 9}))
    assert knobs(RECORD, replace(OTHER, workload={"tests": ["tg128"], "concurrency": 4})) == ()
    served = replace(RECORD, workload={"tests": ["tg128"], "concurrency": 1})
    assert knobs(served, replace(OTHER, workload={"tests": ["tg128"], "concurrency": 4})) == ("workload",)


def test_a_fact_that_one_record_does_not_know_is_named_and_confounds_nothing() -> None:
    first = {"header_digest", "model_bytes", "model_params", "devices", "driver", "bandwidths", "power"}
    old = replace(OTHER, identity=replace(IDENTITY, **dict.fromkeys(first)), workload=None)
    found = compare_records(RECORD, old)
    assert not found.confounded and {fact.field for fact in found.differences.unknown} == {
        "devices",
        "driver",
    }


def test_llama_benchs_words_for_a_model_and_a_machine_are_weighed_by_what_they_tell() -> None:
    told = replace(
        IDENTITY,
        model_digest="llama-bench:1",
        machine="llama-bench:2",
        engine=replace(ENGINE, name="llama-bench"),
    )
    same = replace(
        OTHER, identity=told, machine={"llama_bench": {"cpu_info": "Ryzen 9", "gpu_info": "RTX 4090"}}
    )
    assert knobs(RECORD, same) == ("engine",)
    assert {fact.knob for fact in find_differences(RECORD, same).unknown} == {"model", "machine"}
    bigger = replace(same, identity=replace(told, model_bytes=1001))
    assert "model" in knobs(RECORD, bigger)
    elsewhere = replace(same, machine={"llama_bench": {"cpu_info": "Xeon", "gpu_info": "RTX 4090"}})
    assert "machine" in knobs(RECORD, elsewhere)


def test_knobs_go_by_the_names_of_flags_and_a_wrong_one_names_the_nearest() -> None:
    words = {"ubatch": "ubatch", "-ub": "ubatch", "--n-cpu-moe": "experts", "ctk": "kv_type_k"}
    assert {text: check_knob(text) for text in words} == words
    with pytest.raises(UsageError) as error:
        check_knob("ubacth")
    assert "ubatch" in error.value.hint


def test_records_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(UsageError, match="same on both sides"):
        compare_records(RECORD, RECORD)
    with pytest.raises(UsageError, match="no test in common") as error:
        compare_records(RECORD, replace(OTHER, tests=(result("pp512", [5]),)))
    assert "tg128" in error.value.hint and "pp512" in error.value.hint


def test_against_finds_the_last_record_a_build_or_an_id(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "results.db")
    build = replace(ENGINE, version="0.4.0", llama_commit="feed12345")

    def stored(name: str, day: int, **changes: Any) -> Record:
        made = replace(RECORD, id=name, when=f"2026-10-{day:02}T00:00:00+00:00", **changes)
        store.start(made)
        return made

    stored("cc01", 1)
    stored("cc02", 2, identity=replace(IDENTITY, engine=build))
    stored("cc03", 3, identity=replace(IDENTITY, engine=build, placement="p2"))
    stored("cc04", 4, kind="run")
    stored("cc05", 5, tests=(result("pp512", [5]),))
    stored("cc06", 6, identity=replace(IDENTITY, model_digest="sampled-sha256:ff"))
    newest = stored("cc07", 7)
    stored("cc08", 8)
    assert find_baseline(store, newest, "last").id == "cc03"
    assert find_baseline(store, newest, "feed1").id == "cc02"
    assert find_baseline(store, newest, "0.4.0").id == "cc02"
    assert find_baseline(store, newest, "0c1e570").id == "cc08"
    assert find_baseline(store, newest, "cc06").id == "cc06"
    tuned = {"other-model": "cc06", "this-model": "cc02", "placed": "cc03"}
    assert find_baseline(store, newest, "tuned", tuned).id == "cc02", "of this model, not the newest of all"
    assert find_baseline(store, newest, "placed", tuned).id == "cc03"
    with pytest.raises(UsageError, match="no sweep has tuned"):
        find_baseline(store, newest, "tuned")
    for text, told in (("cc0", "several"), ("nothing", "neither")):
        with pytest.raises(UsageError, match=told):
            find_baseline(store, newest, text)
    with pytest.raises(UsageError, match="no earlier"):
        find_baseline(store, store.get("cc01"), "last")
