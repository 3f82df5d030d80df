"""The trip of `qnext bench run`: a planned model, a grid of tests, every sample kept as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qnext.bench.names import Scenario
from qnext.bench.statistics import sample_warnings
from qnext.config import Paths
from qnext.engine.environment import inherited
from qnext.errors import QnextError, UsageError
from qnext.pipeline.recording import new_record, test_result
from qnext.pipeline.request import Request
from qnext.pipeline.running import RunningModel
from qnext.pipeline.speed_memory import remember_speeds
from qnext.pipeline.surroundings import Notice
from qnext.plan.values import Workload
from qnext.store.record import Record, TestResult
from qnext.store.results import ResultStore


@dataclass(frozen=True, slots=True)
class BenchWatch:
    """What a caller may follow: load progress (0 to 1), the record's id once there is one, samples, tests.

    `on_sample` gets the test, its samples so far (ns) and how many there will be.
    """

    on_load: Callable[[float], None] | None = None
    on_start: Callable[[str], None] | None = None
    on_sample: Callable[[Scenario, Sequence[int], int], None] | None = None
    on_test: Callable[[TestResult], None] | None = None


def run_bench(
    request: Request,
    tests: Sequence[Scenario],
    repetitions: int,
    paths: Paths,
    notice: Notice,
    command: Sequence[str],
    watch: BenchWatch,
) -> Record:
    """Measure `tests` one after the other and store each as it ends; returns the finished record.

    An error or Ctrl-C leaves the finished tests in the store, the record marked failed or interrupted, and
    goes on to the caller.
    """
    if request.parallel != 1:
        raise UsageError("a benchmark measures one sequence at a time", hint="Leave out -np.")
    workload = _workload(tests)
    context = max(_padded(workload.tokens), request.context or 0)
    request = replace(request, context=context, workload=workload)
    store = ResultStore(paths.results_db)
    with RunningModel(request, paths, notice, watch.on_load) as model:
        record = _start(model, store, tests, repetitions, command)
        if watch.on_start is not None:
            watch.on_start(record.id)
        warnings: list[str] = []
        try:
            for number, test in enumerate(tests):
                planned = model.planned
                result, found = _measure(model, test, repetitions, watch)
                if model.planned is not planned:
                    # The engine crashed and went on with a safer layout: other speeds, hence another record.
                    store.finish(record.id, "failed", warnings=warnings, error=model.last_crash)
                    record, warnings = _start(model, store, tests[number:], repetitions, command), []
                    if watch.on_start is not None:
                        watch.on_start(record.id)
                warnings += found
                store.add_test(record.id, result)
                if watch.on_test is not None:
                    watch.on_test(result)
        except (KeyboardInterrupt, BrokenPipeError):
            store.finish(record.id, "interrupted", warnings=[*model.warnings, *warnings])
            raise
        except QnextError as error:
            store.finish(record.id, "failed", warnings=[*model.warnings, *warnings], error=error.message)
            raise
        store.finish(record.id, "ok", allocated=model.opened.allocated, warnings=[*model.warnings, *warnings])
        record = store.get(record.id)
        remember_speeds(record, model.planned, model.build, paths)
    return record


def _start(
    model: RunningModel,
    store: ResultStore,
    tests: Sequence[Scenario],
    repetitions: int,
    command: Sequence[str],
) -> Record:
    names: dict[str, object] = {"tests": [test.name for test in tests], "repetitions": repetitions}
    opened = model.opened
    record = new_record(model.planned, model.build, "bench", opened.allocated, command, names, opened.facts)
    leaking = [f"{found.name} is set in the environment" for found in inherited() if found.reaches_engine]
    record = replace(record, warnings=tuple(leaking))
    store.start(record)
    return record


def _measure(
    model: RunningModel, test: Scenario, repetitions: int, watch: BenchWatch
) -> tuple[TestResult, list[str]]:
    samples: list[int] = []
    for event in model.bench(
        prompt=test.prompt, generate=test.generate, depth=test.depth, repetitions=repetitions
    ):
        if event["event"] == "sample":
            samples.append(int(str(event["ns"])))
            if watch.on_sample is not None:
                watch.on_sample(test, samples, repetitions)
    result = test_result(test, samples, model.planned)
    return result, [f"{test.name}: {warning}" for warning in sample_warnings(samples)]


def _workload(tests: Sequence[Scenario]) -> Workload:
    return Workload(
        prompt=max(test.prompt for test in tests),
        generate=max(test.generate for test in tests),
        depth=max(test.depth for test in tests),
    )


def _padded(tokens: int) -> int:
    """llama.cpp rounds contexts up to 256."""
    return -(-tokens // 256) * 256
