"""Fit how alike the errors of one machine's forecasts are, and show what knowing some of them gains.

    python scripts/fit_history.py [--json] [--write]

Several rows of profiles/speeds/published.csv on one machine and backend, of the same age, stand for what
qnext measures on the machine it runs on. How far their forecasts are off without any of the machine's rows in
the fit tells three standard deviations (`qnext.plan.speed_history`): the likeliest ones, given what is
believed of them. `--write` puts them into qnext/plan/kernels.py. Models under 1 GiB neither teach nor count,
as in qnext.

The gain is shown in pairs: each row forecast with the constants, ranges and deviations that the other
machines give, once as it is and once with the history of the rows beside it on its machine. `others` leaves
out of the history all rows of the same model file: what is learnt has to carry over to another model then.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import fit_speed as speed

from qnext.plan.speed_history import SpeedTest, Spread, learn, parts_ns

BELIEFS = {"machine": 0.35, "model": 0.15, "test": 0.06}
"""Of decode: a third for a machine, 15 % for what differs between files of one family, 6 % between two runs.
Of prefill as much more as its forecast is ordinarily less sure (`fit_speed.ORDINARY`)."""
FREELY = 0.5
"""Standard deviation of a belief's logarithm."""
LEAST_GIB = 1.0


@dataclass(frozen=True)
class Seen:
    """A row with its test: how far its forecast was off, by constants that do not know its machine."""

    row: speed.Row
    test: SpeedTest


def seen_tests(rows: Sequence[speed.Row], of: str, constants: Mapping[str, float]) -> list[Seen]:
    """The rows that can teach, as tests beside the forecast with `constants`."""
    found = []
    for row in rows:
        if of not in row.terms or row.size_gib < LEAST_GIB:
            continue
        terms = {name: amount for name, amount in row.terms[of].items() if not name.startswith("old")}
        parts = parts_ns(terms, constants, row.several_gpus)
        found.append(Seen(row, SpeedTest(row.model, parts, -speed.error_of(row, of, constants))))
    return found


def unseen_tests(rows: Sequence[speed.Row], of: str) -> list[Seen]:
    """Every row's test with constants fitted without any row of its machine."""
    found: list[Seen] = []
    for machine in dict.fromkeys(row.machine for row in rows):
        constants = speed.fit_all([row for row in rows if row.machine != machine])
        found += seen_tests([row for row in rows if row.machine == machine], of, constants)
    return found


def fit_spread(seen: Sequence[Seen], of: str) -> Spread:
    """The deviations that make the errors likeliest, by a search that halves its steps."""
    engines: dict[str, list[SpeedTest]] = {}
    for one in seen:
        engines.setdefault(one.row.engine, []).append(one.test)
    patterns = [(_likeness(tests), np.array([test.longer for test in tests])) for tests in engines.values()]
    believed = np.log(np.array(list(BELIEFS.values())) * speed.ORDINARY[of] / speed.ORDINARY["decode"])
    theta, step = believed.copy(), 0.4

    def unlikely(logs: Any) -> float:
        variances = np.exp(2 * logs)
        total = float((((logs - believed) / FREELY) ** 2).sum())
        for likeness, errors in patterns:
            covariance = sum(variance * kind for variance, kind in zip(variances, likeness, strict=True))
            total += np.linalg.slogdet(covariance)[1] + errors @ np.linalg.solve(covariance, errors)
        return total

    while step > 0.002:
        tries = [theta + step * sign * axis for axis in np.eye(3) for sign in (-1, 1)]
        best = min(tries, key=unlikely)
        if unlikely(best) < unlikely(theta):
            theta = best
        else:
            step /= 2
    return Spread(*(float(value) for value in np.exp(theta)))


def _likeness(tests: Sequence[SpeedTest]) -> tuple[Any, Any, Any]:
    """What errors of one machine share: through its parts, through their model, and each with itself."""
    names = ("gpu", "gpus", "cpu", "travel")
    shares = np.array([[test.parts.get(name, 0.0) for name in names] for test in tests])
    shares /= shares.sum(axis=1, keepdims=True)
    gpu, several = shares[:, 0] + shares[:, 1], shares[:, 1]
    effects = np.stack([gpu, several, shares[:, 2], shares[:, 3]], axis=1)
    same_model = np.array([[float(a.model == b.model) for b in tests] for a in tests])
    return effects @ effects.T, same_model, np.eye(len(tests))


def judge(rows: Sequence[speed.Row], of: str) -> list[dict[str, Any]]:
    """Every row that has others beside it, forecast as it is and with their history."""
    table = []
    for machine in dict.fromkeys(row.machine for row in rows):
        own = [row for row in rows if row.machine == machine]
        beside = {row.engine: sum(r.engine == row.engine and of in r.terms for r in own) for row in own}
        if max(beside.values()) < 2:
            continue
        rest = [row for row in rows if row.machine != machine]
        spread = fit_spread(unseen_tests(rest, of), of)
        ranges = speed.ranges(speed.unseen_errors(rest, of), of)
        seen = seen_tests(own, of, speed.fit_all(rest))
        for one in seen:
            history = [s.test for s in seen if s is not one and s.row.engine == one.row.engine]
            others = [test for test in history if test.model != one.test.model]
            if history:
                table.append(
                    {
                        "machine": machine, "row": one.row.name, "judged": one.row.judged,
                        "model": one.row.model, "engine": one.row.engine, "tests": len(history),
                        "tests_of_others": len(others), "spread": [round(s, 3) for s in _deviations(spread)],
                        "plain": _outcome(one, [], spread, ranges),
                        "history": _outcome(one, history, spread, ranges),
                        "others": _outcome(one, others, spread, ranges) if others else None,
                    }
                )  # fmt: skip
    return table


def _outcome(
    one: Seen, history: Sequence[SpeedTest], spread: Spread, ranges: Mapping[str, tuple[float, float]]
) -> dict[str, Any]:
    """Error of the forecast with this history, its range as factors, and whether the row lies inside."""
    learnt, test = learn(history, spread), one.test
    parts = {part: ns * learnt.times_longer(part) for part, ns in test.parts.items()}
    longer = sum(parts.values()) / sum(test.parts.values()) * learnt.model_longer(test.model)
    left = math.exp(-test.longer) * longer  # measured over forecast speed
    narrow = learnt.narrowing(parts, test.model)
    low, high = (factor**narrow for factor in ranges[one.row.where])
    return {
        "error": round(1 / left - 1, 4),
        "low": round(low, 3),
        "high": round(high, 3),
        "inside": low <= left <= high,
    }


def summary(table: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Median error, share inside and median width of the range, without and with history, paired."""
    found = {}
    for label in ("history", "others"):
        kept = [row for row in table if row[label] is not None]
        closer = sum(abs(math.log1p(r[label]["error"])) < abs(math.log1p(r["plain"]["error"])) for r in kept)
        found[label] = {
            "rows": len(kept),
            "machines": len({row["machine"] for row in kept}),
            "closer": closer,
            "plain": _figures([row["plain"] for row in kept]),
            "with": _figures([row[label] for row in kept]),
        }
    return found


def _figures(outcomes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {
        "median_error": round(statistics.median(abs(one["error"]) for one in outcomes), 4),
        "inside": round(sum(one["inside"] for one in outcomes) / len(outcomes), 4),
        "width": round(statistics.median(one["high"] / one["low"] for one in outcomes), 2),
    }


def _deviations(spread: Spread) -> tuple[float, float, float]:
    return spread.machine, spread.model, spread.test


def write_spreads(rows: Sequence[speed.Row]) -> None:
    """Put the deviations into qnext/plan/kernels.py, between their marks."""
    lines = []
    for of, name in (("decode", "DECODE_SPREAD"), ("prefill", "PREFILL_SPREAD")):
        machine, model, test = _deviations(fit_spread(unseen_tests(rows, of), of))
        lines.append(f"{name} = Spread(machine={machine:.3f}, model={model:.3f}, test={test:.3f})")
    lines.append(f'HISTORY_DIGEST = "{speed.data_digest()}"')
    text = speed.MODULE.read_text()
    block = "\n".join(("# fitted history: begin", *lines, "# fitted history: end"))
    pattern = r"# fitted history: begin\n.*?# fitted history: end"
    speed.MODULE.write_text(re.sub(pattern, lambda _: block, text, flags=re.DOTALL))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.add_argument("--write", action="store_true", help="put the deviations into qnext/plan/kernels.py")
    asked = parser.parse_args()
    rows = speed.read_rows()
    if asked.write:
        write_spreads(rows)
    tables = {of: judge(rows, of) for of in ("decode", "prefill")}
    found = {of: summary(table) for of, table in tables.items()}
    if asked.json:
        print(json.dumps({"digest": speed.data_digest(), "summary": found, **tables}, indent=1))
        return
    for of, table in tables.items():
        print(f"{of}: error without history, with the machine's other rows, with those of other models")
        for row in table:
            cells = [row["plain"], row["history"], row["others"]]
            shown = "  ".join(f"{c['error']:+7.1%}{' ' if c['inside'] else '!'}" if c else "" for c in cells)
            print(f"  {row['engine'][:30]:30} {row['model'][:36]:36} {row['tests']:2}  {shown}")
        for label, one in found[of].items():
            before, after = one["plain"], one["with"]
            print(
                f"  {label}: {one['rows']} rows of {one['machines']} machines, {one['closer']} closer; "
                f"median error {before['median_error']:.1%} to {after['median_error']:.1%}, inside "
                f"{before['inside']:.0%} to {after['inside']:.0%}, range high/low {before['width']} to "
                f"{after['width']}"
            )


if __name__ == "__main__":
    main()
