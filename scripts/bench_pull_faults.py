"""Every fault of tests/hub_faults.py against `download`, with files of some MB, and what became of each.

Besides the server's faults: SIGKILL at every eleventh of a file and again and again, a disk that fills up at
different moments, two processes at once. Printed as JSON: how many ended verified or as a clear error, how
many files with wrong contents had their final name at any time looked at (the bar is 0), and which faults
did not end as they have to. Run from the repository: `.venv/bin/python scripts/bench_pull_faults.py [MB]`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from qnext.models.held import find_places  # noqa: E402
from qnext.models.published import QuantFile  # noqa: E402
from tests.hub_faults import (  # noqa: E402
    Fault,
    FaultyHub,
    Outcome,
    all_faults,
    corrupt_files,
    fill_disk,
    kill_at,
    make_quant,
    mount_small_disk,
    run_fault,
    slow,
    start_download,
    try_download,
    unmount,
)
from tests.hub_server import hub_environment  # noqa: E402

MEGABYTES = 4


def run(megabytes: int = MEGABYTES) -> dict[str, object]:
    """Counts over all faults, each on two shards of `megabytes`."""
    size = megabytes * 1_000_000
    began = time.monotonic()
    skipped: list[str] = []
    outcomes: list[Outcome] = []
    for fault in all_faults(size):
        with tempfile.TemporaryDirectory(prefix="qnext-pull-") as folder:
            outcomes.append(run_fault(fault, Path(folder), [size, size]))
            print(f"{outcomes[-1].seconds:6.2f} s  {fault.name}", file=sys.stderr, flush=True)
    for measure in (_kills, _full_disks, _two_processes):
        with tempfile.TemporaryDirectory(prefix="qnext-pull-") as folder, _hub(Path(folder)) as hub:
            found = list(measure(hub, Path(folder), size))
            outcomes += found
            if not found:
                skipped.append(measure.__name__.strip("_"))
    return {
        "faults": len(outcomes),
        "verified": sum(one.first == "verified" for one in outcomes),
        "killed": sum(one.first.startswith("killed") for one in outcomes),
        "clear_errors": sum(not one.first.startswith(("verified", "killed")) for one in outcomes),
        "verified_by_the_next_run": sum(one.second == "verified" for one in outcomes),
        "corrupt_accepted": sum(len(one.corrupt) for one in outcomes),
        "not_as_they_have_to": [asdict(one) for one in outcomes if not one.holds],
        "skipped": skipped,
        "megabytes": megabytes,
        "seconds": round(time.monotonic() - began, 1),
    }


@contextmanager
def _hub(folder: Path) -> Iterator[FaultyHub]:
    """A server that this process and its children use; `run_fault` brings one of its own."""
    with FaultyHub(folder / "hub") as hub:
        before = dict(os.environ)
        os.environ.update(hub_environment(hub.endpoint, folder / "hf"))
        os.environ["PYTHONPATH"] = str(ROOT)
        try:
            yield hub
        finally:
            os.environ.clear()
            os.environ.update(before)


def _kills(hub: FaultyHub, folder: Path, size: int) -> Iterator[Outcome]:
    """SIGKILL at every eleventh, each time with a fresh cache; then one file killed at each of them."""
    quant, _ = make_quant(hub, [size])
    hub.fault = Fault("", "verified", slow(size))

    def attempt(cache: Path, at: int, name: str) -> Outcome:
        began, (place,) = time.monotonic(), find_places(quant, cache)
        kept = kill_at(start_download(quant, cache), place, at)
        corrupt = corrupt_files(cache)
        first = f"killed with {kept} bytes here" if 0 < kept < size else "verified"  # too late to be killed
        return Outcome(name, "error", first, "", corrupt, time.monotonic() - began)

    for eleventh in range(1, 11):
        cache = folder / f"killed-{eleventh}"
        yield _finish(attempt(cache, size * eleventh // 11, f"SIGKILL at {eleventh}/11"), cache, quant)
    last = None
    for eleventh in range(1, 11):
        last = attempt(folder / "killed", size * eleventh // 11, "SIGKILL ten times")
    assert last is not None
    yield _finish(last, folder / "killed", quant)


def _finish(outcome: Outcome, cache: Path, quant: QuantFile) -> Outcome:
    outcome.second = try_download(quant, cache)
    outcome.corrupt += corrupt_files(cache)
    return outcome


def _full_disks(hub: FaultyHub, folder: Path, size: int) -> Iterator[Outcome]:
    """A small disk that another program fills while a file is written, with different room left."""
    quant, _ = make_quant(hub, [size])
    for tenth in (0, 1, 3, 5, 7, 9):
        disk = folder / f"disk-{tenth}"
        if not mount_small_disk(disk, 34 + 2 * size // 1_000_000):
            return
        try:
            hub.fault = Fault("", "error", fill_disk(disk, left=size * tenth // 10))
            began = time.monotonic()
            first = try_download(quant, disk)
            corrupt = corrupt_files(disk)
            hub.fault = None
            (disk / "filler").unlink()
            outcome = Outcome(
                f"disk full at {tenth}/10", "error", first, "", corrupt, time.monotonic() - began
            )
            yield _finish(outcome, disk, quant)
        finally:
            unmount(disk)


def _two_processes(hub: FaultyHub, folder: Path, size: int) -> Iterator[Outcome]:
    """Both at once; the first killed on the way; three of them."""
    quant, _ = make_quant(hub, [size])
    for count in (2, 3):
        for kill_one in (False, True):
            cache = folder / f"together-{count}-{kill_one}"
            hub.fault = Fault("", "verified", slow(2 * size))
            began = time.monotonic()
            children = [start_download(quant, cache) for _ in range(count)]
            if kill_one:
                (place,) = find_places(quant, cache)
                kill_at(children.pop(0), place, size // 3)
            ended = [child.wait(timeout=120) for child in children]
            name = f"{count} processes" + (", one killed" if kill_one else "")
            first = "verified" if not any(ended) else f"exit codes {ended}"
            outcome = Outcome(name, "verified", first, "", corrupt_files(cache), time.monotonic() - began)
            yield _finish(outcome, cache, quant)


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]) if len(sys.argv) > 1 else MEGABYTES), indent=2))
