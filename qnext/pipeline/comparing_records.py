"""The trip of `qnext bench compare`: two records, test by test, and what differs between them besides.

Samples of one run say nothing of what changes from one start to the next: where memory landed, how warm the
machine was, who else worked. So the interval of the samples alone would call two equal runs different now and
then (on a machine shared with other work, 24 of 82). A difference is shown here only where the interval lies
beyond what equal runs differ by: 3 %, or what the records of this machine show, if that is more (2 of 82).
Where no records tell, how far apart the samples of one run lie stands for it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from math import ceil, exp, log
from typing import Literal

from qnext.bench.statistics import UnpairedRatio, relative_spread, unpaired_ratio
from qnext.errors import UsageError
from qnext.plan.values import Placement
from qnext.store import differences
from qnext.store.differences import Differences, find_differences
from qnext.store.record import Record, TestResult
from qnext.store.results import ResultStore

CONFIDENCE = 0.99
EQUAL_RUNS = 0.03
"""Medians of two runs of one configuration on a quiet machine lie within this of each other."""
FEWEST_PAIRS = 3
MOST_RUNS = 50
"""Of one configuration the newest so many runs tell how far equal ones lie apart."""

TOO_FEW = "too few samples"

Word = Literal["faster", "slower", "no difference shown"]

_ALIASES = {
    "ub": "ubatch",
    "b": "batch",
    "t": "threads",
    "tb": "threads_batch",
    "fa": "flash_attention",
    "ctk": "kv_type_k",
    "ctv": "kv_type_v",
    "ngl": "n_gpu_layers",
    "ncmoe": "experts",
    "n_cpu_moe": "experts",
    "ot": "overrides",
    "ts": "tensor_split",
    "c": "context",
    "ctx_size": "context",
    "np": "parallel",
    "slots": "parallel",
    "quant": "model",
    "build": "engine",
    "repack": "extra_buffers",
}
"""llama.cpp's names of flags, and others' words, for knobs."""


@dataclass(frozen=True, slots=True)
class TestComparison:
    """One test of both records: median speeds, and how much faster the second is.

    `ratio` is candidate over baseline, `interval` None without samples on a side. `equal_runs` is how far
    apart runs of one configuration lie here (0.03 is 3 %), `assumed` from their samples where no records
    tell. `why` explains a word that shows nothing.
    """

    __test__ = False  # keeps pytest from collecting it

    name: str
    baseline_tps: float
    candidate_tps: float
    ratio: float
    interval: UnpairedRatio | None
    equal_runs: float
    assumed: bool
    word: Word
    why: str = ""


@dataclass(frozen=True, slots=True)
class RecordComparison:
    """`knobs` are those meant to differ; `confounded` names the others that differ too."""

    baseline: Record
    candidate: Record
    tests: tuple[TestComparison, ...]
    only_baseline: tuple[str, ...]
    only_candidate: tuple[str, ...]
    differences: Differences
    knobs: tuple[str, ...]
    confounded: tuple[str, ...]


def compare_records(
    baseline: Record, candidate: Record, kin: Iterable[Record] = (), knobs: Sequence[str] = ()
) -> RecordComparison:
    """Each test that both records have. `kin` are other records of model and machine, for the noise of runs.

    Without `knobs` the one knob that differs is the one that is meant; if several differ, all confound.
    Raises UsageError for an unknown knob, the same record twice, and records without a test in common.
    """
    if baseline.id == candidate.id:
        raise UsageError(f"record {baseline.id} is the same on both sides", hint="Give two records' ids.")
    named = tuple(dict.fromkeys(check_knob(knob) for knob in knobs))
    found = find_differences(baseline, candidate)
    ours, theirs = _by_name(baseline), _by_name(candidate)
    shared = [name for name in ours if name in theirs]
    if not shared:
        raise UsageError(
            f"records {baseline.id} and {candidate.id} have no test in common",
            hint=f"{baseline.id} has {_names(ours)}; {candidate.id} has {_names(theirs)}.",
        )
    runs = [baseline, candidate, *kin]
    meant = named or (found.knobs if len(found.knobs) == 1 else ())
    return RecordComparison(
        baseline=baseline,
        candidate=candidate,
        tests=tuple(_compare(ours[name], theirs[name], _run_noise(name, runs)) for name in shared),
        only_baseline=tuple(name for name in ours if name not in theirs),
        only_candidate=tuple(name for name in theirs if name not in ours),
        differences=found,
        knobs=meant,
        confounded=tuple(
            dict.fromkeys(
                fact.knob for fact in found.differing if fact.knob not in meant and fact.field not in meant
            )
        ),
    )


def compare_stored(
    store: ResultStore, baseline: Record, candidate: Record, knobs: Sequence[str] = ()
) -> RecordComparison:
    """`compare_records` with all that the store knows of equal runs here."""
    kin = {record.id: record for side in (baseline, candidate) for record in store.kin(side)}
    others = [record for name, record in kin.items() if name not in (baseline.id, candidate.id)]
    return compare_records(baseline, candidate, others, knobs)


def find_baseline(
    store: ResultStore, record: Record, against: str, tuned: Mapping[str, str] | None = None
) -> Record:
    """What `--against` names: `last`, `tuned`, a tuned profile, a build (commit, version, digest), a record.

    `last` gives the newest benchmark of the same model and machine before `record` that shares a test with
    it, a build the newest of all, one of the same placement first. `tuned` are the winners' records by the
    names of profiles, the newest first: a profile gives the newest earlier benchmark of its placement, or
    that record. Raises UsageError when there is none.
    """
    tests = _by_name(record).keys()
    kin = [other for other in store.kin(record) if other.kind != "run" and tests & _by_name(other).keys()]
    if against == "last":
        older = [other for other in kin if other.when <= record.when and other.kind == "bench"]
        if not older:
            raise UsageError(
                f"no earlier benchmark of this model and machine shares a test with {record.id}",
                hint="See what there is: qnext bench history",
            )
        return older[0]
    if against == "tuned" or against in (tuned or {}):
        return _tuned_baseline(store, record, kin, against, tuned or {})
    built = [other for other in kin if _is_build(other, against)]
    if built:
        alike = (other for other in built if other.identity.placement == record.identity.placement)
        return next(alike, built[0])
    try:
        return store.get(against)
    except UsageError as error:
        if "several" in error.message:
            raise
        raise UsageError(
            f"'{against}' is neither a record nor a build that this model was measured with here",
            hint="Give --against last, tuned, an id from `qnext bench history`, or the start of a llama.cpp "
            "commit.",
        ) from error


def _tuned_baseline(
    store: ResultStore, record: Record, kin: Sequence[Record], against: str, tuned: Mapping[str, str]
) -> Record:
    own = {one.id: one for one in store.kin(record)}
    found = [tuned[against]] if against in tuned else [one for one in tuned.values() if one in own]
    if not found:
        raise UsageError(
            "no sweep has tuned this model on this machine", hint="Tune it first: qnext bench sweep MODEL"
        )
    winner = store.get(found[0])
    alike = (
        other
        for other in kin
        if other.identity.placement == winner.identity.placement and other.when <= record.when
    )
    return next(alike, winner)


def _is_build(record: Record, text: str) -> bool:
    engine = record.identity.engine
    commit = (engine.llama_commit or "").lower()
    long_enough = len(text) >= 5  # shorter ones are as likely the start of an id
    return text == engine.version or (
        long_enough and (commit.startswith(text.lower()) or engine.build.startswith(text))
    )


def check_knob(text: str) -> str:
    """The knob that `text` names, flags of llama.cpp included. Raises UsageError with the nearest one."""
    word = text.lstrip("-").replace("-", "_").lower()
    word = _ALIASES.get(word, word)
    known = {entry.name for entry in fields(Placement)} | {"threads", "kv_type", "experts"}
    known |= {differences.MODEL, differences.ENGINE, differences.MACHINE, differences.WORKLOAD}
    known |= {differences.DEVICES, differences.DRIVER, differences.BANDWIDTH}
    known |= {differences.POWER, differences.ENVIRONMENT}
    if word not in known:
        near = difflib.get_close_matches(word, [*known, *_ALIASES], n=1)
        raise UsageError(
            f"--knob {text}: there is no such knob",
            hint=f"Did you mean {near[0]}?"
            if near
            else "For example ubatch, threads, experts, engine or model.",
        )
    return word


def _compare(a: TestResult, b: TestResult, noise: float | None) -> TestComparison:
    apart = _samples_apart(a, b) if noise is None else noise
    equal_runs = max(EQUAL_RUNS, apart)
    ratio, interval, why = b.median_tps / a.median_tps, None, ""
    word: Word = "no difference shown"
    if not a.samples_ns or not b.samples_ns:
        why = "samples are not known"
    else:
        interval = unpaired_ratio(a.samples_ns, b.samples_ns, confidence=CONFIDENCE)
        ratio = interval.ratio
        word, why = _verdict(interval, equal_runs)
    return TestComparison(
        name=a.name,
        baseline_tps=a.median_tps,
        candidate_tps=b.median_tps,
        ratio=ratio,
        interval=interval,
        equal_runs=equal_runs,
        assumed=noise is None,
        word=word,
        why=why,
    )


def _samples_apart(a: TestResult, b: TestResult) -> float:
    """How far apart the samples of one run lie, of the two the worse: runs lie no closer than samples."""
    return max((relative_spread(test.samples_ns) for test in (a, b) if test.samples_ns), default=0.0)


def _verdict(interval: UnpairedRatio, equal_runs: float) -> tuple[Word, str]:
    if interval.confidence < CONFIDENCE:
        return "no difference shown", TOO_FEW
    if interval.low > 1 + equal_runs:
        return "faster", ""
    if interval.high < 1 / (1 + equal_runs):
        return "slower", ""
    if interval.low <= 1 <= interval.high:
        return "no difference shown", ""
    return "no difference shown", f"equal runs here differ by {equal_runs:.0%}"


def _run_noise(name: str, runs: Sequence[Record]) -> float | None:
    """How far apart the medians of two equal runs of a test lie in 19 of 20 cases (0.03 is 3 %).

    Known from all pairs of `runs` that share their configuration; None where there are fewer than three.
    """
    groups: dict[tuple[object, ...], list[float]] = {}
    for run in runs:
        identity, test = run.identity, _by_name(run).get(name)
        if test is not None and test.samples_ns and run.status == "ok":
            key = (identity.model_digest, identity.machine, identity.placement, identity.engine)
            groups.setdefault(key, []).append(log(test.median_tps))
    apart = sorted(abs(x - y) for logs in groups.values() for x, y in combinations(logs[:MOST_RUNS], 2))
    return exp(apart[ceil(0.95 * len(apart)) - 1]) - 1 if len(apart) >= FEWEST_PAIRS else None


def _by_name(record: Record) -> dict[str, TestResult]:
    """Tests by name; of one that is there twice the last."""
    return {test.name: test for test in record.tests}


def _names(tests: Iterable[str]) -> str:
    return ", ".join(tests) or "none"
