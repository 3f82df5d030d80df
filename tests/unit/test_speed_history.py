"""What was measured here corrects later forecasts: by how much, of what, and for how long it is believed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.bench.names import parse_name
from qnext.config import Paths
from qnext.engine.build import EngineBuild
from qnext.models.shape import read_shape
from qnext.models.synth.imagined import imagined_header
from qnext.pipeline import speed_memory
from qnext.pipeline.planning import PlannedModel, plan_model
from qnext.pipeline.recording import new_record
from qnext.pipeline.recording import test_result as finished_test
from qnext.pipeline.request import Request
from qnext.pipeline.speed_memory import recall_speeds, remember_slices, remember_speeds
from qnext.plan.kernels import DATA_DIGEST, DECODE_RANGE, DECODE_SPREAD, HISTORY_DIGEST
from qnext.plan.speed import MachineSpeeds
from qnext.plan.speed_history import NOTHING_LEARNT, Learnt, SpeedTest, forecast_range, learn
from qnext.plan.values import Prediction, Workload
from qnext.store.record import Record

BUILD = EngineBuild("llama-cpp-python", "0.3.36", "0c1e57098", "b1", ("cpu",))
SECOND_BUILD = replace(BUILD, digest="b2")


def cpu_test(model: str, longer: float, doubt: float = 1.0) -> SpeedTest:
    return SpeedTest(model, {"cpu": 1e7}, longer, doubt)


def middle(learnt: Learnt, parts: dict[str, float], model: str) -> tuple[float, float]:
    """(forecast time over the raw one, high end over low end of the range)."""
    corrected = {part: ns * learnt.times_longer(part) for part, ns in parts.items()}
    tps, _ = forecast_range(corrected, (0.5, 2.0), learnt, model)
    return 1e9 / tps.mid / sum(parts.values()), tps.high / tps.low


def test_the_model_that_was_measured_is_known_best_and_another_one_less() -> None:
    learnt = learn([cpu_test("a", 0.3)], DECODE_SPREAD)
    same, other = middle(learnt, {"cpu": 1e7}, "a"), middle(learnt, {"cpu": 1e7}, "b")
    assert 1 < other[0] < same[0] < math.exp(0.3)
    assert same[1] < other[1] < 4


def test_a_cpu_teaches_nothing_about_a_gpu() -> None:
    learnt = learn([cpu_test("a", 0.3)] * 3, DECODE_SPREAD)
    assert learnt.times_longer("gpu") == learnt.times_longer("travel") == 1
    assert middle(learnt, {"gpu": 1e7}, "b") == pytest.approx((1, 4), rel=1e-4)
    mixed = middle(learnt, {"gpu": 5e6, "cpu": 5e6}, "b")
    assert 1 < mixed[0] < middle(learnt, {"cpu": 1e7}, "b")[0]


def test_repeating_one_model_never_makes_sure_of_another() -> None:
    """Its own deviation stays: a hundred tests of one file say little more of others than one."""
    many = learn([cpu_test("a", 0.3)] * 100, DECODE_SPREAD)
    least = math.sqrt(DECODE_SPREAD.model**2 + DECODE_SPREAD.test**2)
    before = math.sqrt(DECODE_SPREAD.machine**2 + least**2)
    assert many.narrowing({"cpu": 1e7}, "b") > least / before
    assert many.narrowing({"cpu": 1e7}, "a") < 0.3


def test_a_disturbed_test_does_not_carry_the_forecast_away() -> None:
    """One answer nine times too slow (seen on a busy machine) moves it by less than a third."""
    learnt = learn([cpu_test("a", math.log(9), doubt=3.0)], DECODE_SPREAD)
    assert middle(learnt, {"cpu": 1e7}, "a")[0] < 1.5
    steady = learn([cpu_test("a", 0.3)], DECODE_SPREAD)
    assert middle(steady.with_test(cpu_test("a", 2.2)), {"cpu": 1e7}, "a")[0] < 1.6


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.builds(
            SpeedTest,
            st.sampled_from(["a", "b", "c"]),
            st.dictionaries(
                st.sampled_from(["gpu", "gpus", "cpu", "travel", "rpc"]), st.floats(1, 1e9), min_size=1
            ),
            st.floats(-2.3, 2.3),
            st.sampled_from([1.0, 3.0]),
        ),
        max_size=12,
    ),
    st.dictionaries(st.sampled_from(["gpu", "gpus", "cpu", "travel"]), st.floats(1, 1e9), min_size=1),
)
def test_whatever_was_measured_the_forecast_is_finite_and_its_range_never_wider(
    tests: list[SpeedTest], parts: dict[str, float]
) -> None:
    learnt = learn(tests, DECODE_SPREAD)
    assert 0 < learnt.narrowing(parts, "a") <= 1
    longer = middle(learnt, parts, "a")[0]
    assert 0 < longer < 100 or sum(parts.values()) > 1e10


# The trip: a record is remembered, the next plan starts from it.


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path / "config", tmp_path / "data", tmp_path / "cache")


@pytest.fixture
def planned(demo_model: Path, paths: Paths) -> PlannedModel:
    """The demo's plan on a recorded CPU box, its model taken for a real one."""
    from qnext.plan.plan import make_plan
    from qnext.plan.problem import make_problem

    request = Request(model=str(demo_model), hardware="epyc-12ch-cpu")
    small = plan_model(request, paths, print)
    header = replace(imagined_header("qwen3-next-80b-a3b", "Q4_K_M"), paths=small.model.header.paths)
    around = small.surroundings
    problem = make_problem(
        header, read_shape(header), around.machine, small.problem.options, speeds=around.speeds
    )
    return replace(small, problem=problem, plan=make_plan("big", problem, around.speeds))


def record(planned: PlannedModel, names: str = "tg128", factor: float = 0.8, **changes: object) -> Record:
    """A finished record whose tests ran at `factor` times the raw forecast, three steady samples each."""
    raw = replace(planned, surroundings=replace(planned.surroundings, speeds=raw_speeds(planned)))
    tests = []
    for name in names.split(","):
        test = parse_name(name)
        forecast = raw.forecast(Workload(test.prompt, test.generate, test.depth))
        tps = (forecast.prefill_tps if test.prompt else forecast.decode_tps).mid  # type: ignore[union-attr]
        tests.append(finished_test(test, [round(test.tokens * 1e9 / tps / factor)] * 3, raw))
    made = new_record(planned, BUILD, "bench", (), (), {"tests": names})
    return replace(made, status="ok", tests=tuple(tests), **changes)  # type: ignore[arg-type]


def raw_speeds(planned: PlannedModel) -> MachineSpeeds:
    return replace(planned.surroundings.speeds, history=NOTHING_LEARNT)


def again(planned: PlannedModel, paths: Paths, build: EngineBuild = BUILD) -> Prediction:
    """The forecast of the next plan."""
    around = planned.surroundings
    history = recall_speeds(around.machine, build, paths, around.speeds)
    speeds = replace(around.speeds, history=history)
    return replace(planned, surroundings=replace(around, speeds=speeds)).forecast(Workload(0, 128, 0))


def decode(prediction: Prediction) -> float:
    assert prediction.decode_tps is not None
    return prediction.decode_tps.mid


def test_a_measured_speed_is_the_next_forecast_and_the_range_narrows(
    planned: PlannedModel, paths: Paths
) -> None:
    before = again(planned, paths)
    assert before.source == "roofline"
    remember_speeds(record(planned), planned, BUILD, paths)
    after = again(planned, paths)
    assert after.source == "history"
    assert decode(after) == pytest.approx(0.8 * decode(before), rel=0.02)
    assert after.decode_tps is not None and before.decode_tps is not None
    assert after.decode_tps.high / after.decode_tps.low < 1.5 < before.decode_tps.high / before.decode_tps.low
    assert after.prefill_tps == before.prefill_tps  # nothing was measured of it


def test_what_slices_said_is_the_next_forecast_until_the_model_itself_was_measured(
    planned: PlannedModel, paths: Paths
) -> None:
    raw = again(planned, paths)
    said = {Workload(0, 8, 0): decode(raw) / 2, Workload(256, 0, 0): 100.0}
    remember_slices(said, planned, BUILD, paths)
    sliced = again(planned, paths)
    assert (raw.source, sliced.source) == ("roofline", "slice")
    assert decode(sliced) == pytest.approx(decode(raw) / 2, rel=0.2)
    remember_speeds(record(planned), planned, BUILD, paths)
    assert again(planned, paths).source == "history"


def test_corrections_do_not_compound(planned: PlannedModel, paths: Paths) -> None:
    """A test is held against the raw forecast, also when it was planned with a corrected one."""
    raw = decode(again(planned, paths))
    for _ in range(5):
        around = planned.surroundings
        history = recall_speeds(around.machine, BUILD, paths, around.speeds)
        knowing = replace(around, speeds=replace(around.speeds, history=history))
        remember_speeds(record(planned), replace(planned, surroundings=knowing), BUILD, paths)
    assert decode(again(planned, paths)) == pytest.approx(0.8 * raw, rel=0.02)
    (kept,) = paths.probes_dir.glob("speeds-*")
    assert len(json.loads(kept.read_text())["tests"]) == 1  # the same test again replaces itself


def test_another_engine_build_starts_anew(planned: PlannedModel, paths: Paths) -> None:
    raw = again(planned, paths)
    remember_speeds(record(planned), planned, BUILD, paths)
    assert again(planned, paths, SECOND_BUILD) == raw


def test_only_what_a_forecast_means_teaches(
    planned: PlannedModel, paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = record(planned)
    shaky = replace(good.tests[0], samples_ns=(10**9, 2 * 10**9, 3 * 10**9))
    short = replace(good.tests[0], generate=16, samples_ns=good.tests[0].samples_ns[:1])
    absurd = replace(good.tests[0], median_tps=good.tests[0].median_tps * 50)
    identity = good.identity
    for refused in (
        replace(good, status="failed"),
        replace(good, tests=(shaky,)),
        replace(good, tests=(short,)),
        replace(good, tests=(absurd,)),
        replace(good, identity=replace(identity, environment={"GGML_CPU_DISABLE_FUSION": "1"})),
        replace(good, identity=replace(identity, power={"on_battery": True})),
    ):
        remember_speeds(refused, planned, BUILD, paths)
        assert again(planned, paths).source == "roofline"
    few = replace(planned.plan, placement=replace(planned.plan.placement, threads=1))
    remember_speeds(good, replace(planned, plan=few), BUILD, paths)
    assert again(planned, paths).source == "roofline"


def test_a_model_that_fits_into_caches_does_not_teach(demo_model: Path, paths: Paths) -> None:
    demo = plan_model(Request(model=str(demo_model), hardware="epyc-12ch-cpu"), paths, print)
    remember_speeds(record(demo), demo, BUILD, paths)
    assert not list(paths.probes_dir.glob("speeds-*"))


@pytest.mark.parametrize(
    "content",
    [
        "", "\xff", "[]", "[" * 10_000, '{"tests": 3}', '{"tests": [3, null, {}]}',
        '{"tests": [{"kind": []}, {"kind": "decode", "terms": 3}]}',
        '{"tests": [{"kind": "decode", "terms": {}, "ram_bps": 1, "several_gpus": 0, "tps": 0, "model": 1}]}',
        '{"tests": [{"kind": "decode", "model": "a", "ram_bps": null, "several_gpus": false, "samples": 3, '
        '"terms": {"cpu_read_block": 1e400}, "tps": 5}]}',
    ],
)  # fmt: skip
def test_a_file_of_garbage_counts_as_nothing_measured_and_is_replaced(
    planned: PlannedModel, paths: Paths, content: str
) -> None:
    raw = again(planned, paths)
    remember_speeds(record(planned), planned, BUILD, paths)
    (kept,) = paths.probes_dir.glob("speeds-*")
    kept.write_bytes(content.encode("latin-1"))
    assert again(planned, paths) == raw
    remember_speeds(record(planned), planned, BUILD, paths)
    assert again(planned, paths).source == "history"
    kept.unlink()
    assert again(planned, paths) == raw


def test_memory_measured_anew_does_not_shift_what_was_learnt(planned: PlannedModel, paths: Paths) -> None:
    """What is known is the speed that was reached, not its share of a bandwidth measured wrongly."""
    remember_speeds(record(planned), planned, BUILD, paths)
    reached = decode(again(planned, paths))
    around = planned.surroundings
    assert around.speeds.ram_bps is not None
    anew = replace(around.speeds, ram_bps=round(around.speeds.ram_bps * 1.2))
    later = replace(planned, surroundings=replace(around, speeds=anew))
    assert decode(again(later, paths)) == pytest.approx(reached, rel=0.03)


def test_a_long_conversation_does_not_drive_out_other_models(planned: PlannedModel, paths: Paths) -> None:
    remember_speeds(record(planned), planned, BUILD, paths)
    (kept,) = paths.probes_dir.glob("speeds-*")
    (entry,) = json.loads(kept.read_text())["tests"]
    others = [{**entry, "model": "other", "test": f"tg{n}"} for n in range(100)]
    newest = speed_memory._newest([entry, *others])
    assert newest == [entry, *others[-speed_memory.KEPT_OF_MODEL :]]


def test_history_and_forecast_rest_on_the_same_measurements_and_nothing_learnt_changes_nothing() -> None:
    assert HISTORY_DIGEST == DATA_DIGEST, "run scripts/fit_history.py --write"
    wide, words = forecast_range({"cpu": 1e7}, DECODE_RANGE["cpu"], None, "a")
    assert words == "" and wide.mid == 100
    assert (wide.low, wide.high) == tuple(round(100 * factor, 2) for factor in DECODE_RANGE["cpu"])
