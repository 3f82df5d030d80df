"""Plans of models not downloaded: all quants of a repository, from a distant server."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from claims import ROOT, CannotMeasure, Figure, claim
from qnext.engine.build import installed_build

REPO = "user/Qwen3-Next-80B-A3B-Instruct-GGUF"
QUANTS = (
    *("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ4_XS", "Q4_0"),
    *("Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "BF16"),
)
LATENCY_S = 0.03
LIMIT_S = 3.0
LIMIT_BYTES = 12_000_000
LIMIT_KEPT_S = 1.0
TURNS = 3
MACHINES = {"this machine, dry run included": ("--ram", "64G"), "a GPU": ("--hardware", "rtx5080-128gb")}
"""For whom the whole command plans: with an engine to ask, and where each quant is searched for a placement
on two devices. A recorded machine has no engine."""

# A process of its own: what the user waits for includes the imports.
_READ = """
import sys, time
began = time.perf_counter()
from pathlib import Path
from qnext.models.hub import list_repo
from qnext.models.hub_ref import HubRef
from qnext.models.remote_header import read_remote_headers
from qnext.models.shape import read_shape
folder = Path(sys.argv[2])
listing = list_repo(HubRef(sys.argv[1]), folder)
shapes = [read_shape(header) for header in read_remote_headers(listing.quants, folder).values()]
assert len(shapes) == int(sys.argv[3])
print(time.perf_counter() - began)
"""


@claim(
    "remote-plan-time",
    f"`qnext plan` of {len(QUANTS)} quants of an 80B model from a server {LATENCY_S * 1000:.0f} ms away",
    bar=f"under {LIMIT_S:g} s",
)
def measure_remote_plan_time() -> Figure:
    if installed_build() is None:
        raise CannotMeasure("no engine to make a dry run with: ./scripts/qnext --version builds it")
    plans = _measured().plans
    each = "; ".join(f"{machine} {seconds:.2f} s" for machine, seconds in plans.items())
    slowest = max(plans.values())
    detail = f"whole command, median of {TURNS}, no header or dry run kept: {each}"
    return Figure(slowest, "s", slowest < LIMIT_S, detail)


@claim(
    "remote-plan-bytes",
    f"bytes fetched of one file for that plan of {len(QUANTS)} quants",
    bar=f"under {LIMIT_BYTES / 1e6:g} MB per file",
)
def measure_remote_plan_bytes() -> Figure:
    sent = _measured().sent
    detail = f"the largest of {len(sent)} files; all together {sum(sent) / 1e6:.1f} MB"
    return Figure(max(sent) / 1e6, "MB", max(sent) < LIMIT_BYTES, detail)


@claim(
    "remote-headers-time",
    f"the headers alone of those {len(QUANTS)} quants",
    bar=f"under {LIMIT_S:g} s",
)
def measure_remote_headers_time() -> Figure:
    first = _measured().headers
    return Figure(first, "s", first < LIMIT_S, f"median of {TURNS} processes, imports included, nothing kept")


@claim(
    "kept-headers-time",
    f"the same headers once they are kept, {len(QUANTS)} quants",
    bar=f"under {LIMIT_KEPT_S:g} s",
)
def measure_kept_headers_time() -> Figure:
    again = _measured().kept
    detail = f"median of {TURNS} processes, imports and one request included"
    return Figure(again, "s", again < LIMIT_KEPT_S, detail)


@dataclass(frozen=True, slots=True)
class _Measured:
    """Median seconds of reading headers from the server and from the cache, and of whole plans by machine;
    bytes sent of each file for one plan."""

    headers: float
    kept: float
    plans: dict[str, float]
    sent: list[int]


@cache
def _measured() -> _Measured:
    with tempfile.TemporaryDirectory() as name, _serve(Path(name)) as server:
        scratch = Path(name)
        environment = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(scratch / "hf"), "NO_PROXY": "*"}
        probed = scratch / "probed"  # what is asked once per machine has been asked before
        _run("-m", "qnext", "plan", "demo", environment={"QNEXT_HOME": str(probed)})
        headers: list[float] = []
        kept: list[float] = []
        plans: dict[str, list[float]] = {machine: [] for machine in MACHINES}
        sent: list[int] = []
        for turn in range(TURNS):
            folder = str(scratch / f"kept{turn}")
            for seconds in (headers, kept):
                argv = ("-c", _READ, REPO, folder, str(len(QUANTS)))
                seconds.append(float(_run(*argv, environment=environment)))
            for machine, flags in MACHINES.items():
                home = scratch / "home"
                shutil.copytree(probed, home)
                before, began = server.sent(), time.perf_counter()
                plan = _run(
                    *("-m", "qnext", "plan", REPO, "--json", *flags),
                    environment={**environment, "QNEXT_HOME": str(home)},
                )
                plans[machine].append(time.perf_counter() - began)
                assert len(json.loads(plan)["candidates"]) == len(QUANTS)
                sent = list((server.sent() - before).values())
                shutil.rmtree(home)
    medians = {machine: statistics.median(seconds) for machine, seconds in plans.items()}
    return _Measured(statistics.median(headers), statistics.median(kept), medians, sent)


class _Server:
    """The local Hub in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout
        self.endpoint = self._stdout.readline().strip()

    def sent(self) -> Counter[str]:
        """Bytes of each file sent so far."""
        self._stdin.write("\n")
        self._stdin.flush()
        sent = Counter[str]()
        for answer in json.loads(self._stdout.readline()):
            if answer["at"] == "cdn":
                sent[answer["path"]] += answer["sent"]
        return sent


@contextmanager
def _serve(scratch: Path) -> Iterator[_Server]:
    """A repository of headers of the 80B model, served."""
    folder = scratch / "served" / REPO
    folder.mkdir(parents=True)
    for quant in QUANTS:
        _run("-m", "qnext", "synth", "qwen3-next-80b-a3b", "--quant", quant, "--header-only",
             "-o", str(folder / f"Qwen3-Next-80B-A3B-Instruct-{quant}.gguf"))  # fmt: skip
    argv = [sys.executable, "-m", "tests.hub_server", str(scratch / "served"), str(LATENCY_S)]
    with subprocess.Popen(
        argv,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            yield _Server(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(timeout=10)


def _run(*argv: str, environment: dict[str, str] | None = None) -> str:
    ran = subprocess.run(
        [sys.executable, *argv],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=True,
    )
    return ran.stdout
