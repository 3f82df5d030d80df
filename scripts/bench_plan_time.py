"""How long `qnext plan` takes on the 48-layer 80B header, and how much memory its own process needs.

The whole command is timed, from start to exit, beside a bare interpreter: interleaved, so that a machine that
slows down slows all alike. `cached` finds its dry runs in the cache, `uncached` has to start the engine for
each (the one-off probes of the machine are made before). Processor time is given too, which other programs
disturb less. Run from the repository: `.venv/bin/python scripts/bench_plan_time.py [ROUNDS]`.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RAM = "60G"  # enough for the Q4_K_M file: nothing is loaded
ROUNDS = 9

# Runs the command in this process and then says what the process itself, not its children, took at most.
_COMMAND = """
import re, sys
from pathlib import Path
from qnext.cli.main import main
try:
    main()
finally:
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\\s+(\\d+)", status.read_text()) if status.exists() else None
    print(peak.group(1) if peak else 0, file=sys.stderr)
"""


def run(rounds: int = ROUNDS) -> dict[str, object]:
    """Seconds (median, low, high) of each kind of run, and the command's own peak memory in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        home, model = Path(folder) / "home", Path(folder) / "80b.gguf"
        environment = {**os.environ, "QNEXT_HOME": str(home)}
        bare = [sys.executable, "-P", "-c", "pass"]
        synth = ["synth", "qwen3-next-80b-a3b", "--quant", "Q4_K_M", "--header-only", "-o", str(model)]
        subprocess.run([sys.executable, "-m", "qnext", *synth], cwd=ROOT, env=environment, check=True,
                       capture_output=True)  # fmt: skip
        plan = [sys.executable, "-c", _COMMAND, "plan", str(model), "--json", "--ram", RAM]
        _timed(plan, environment)  # probes, byte code, page cache
        wall: dict[str, list[float]] = {"bare": [], "uncached": [], "cached": []}
        cpu: dict[str, list[float]] = {"bare": [], "uncached": [], "cached": []}
        peak_kib = 0
        for _ in range(rounds):
            for kind, argv in (("bare", bare), ("uncached", plan), ("cached", plan)):
                if kind == "uncached":
                    for cache in home.rglob("dry-runs"):
                        shutil.rmtree(cache)
                seconds, busy, said = _timed(argv, environment)
                wall[kind].append(seconds)
                cpu[kind].append(busy)
                if kind != "bare":
                    peak_kib = max(peak_kib, int(said.split()[-1]))
    return {
        "rounds": rounds,
        "wall_s": {kind: _spread(values) for kind, values in wall.items()},
        "processor_s": {kind: _spread(values) for kind, values in cpu.items()},
        "own_peak_mib": round(peak_kib / 1024, 1),
        "load": round(os.getloadavg()[0], 1),
    }


def _timed(argv: list[str], environment: dict[str, str]) -> tuple[float, float, str]:
    """Wall and processor seconds of one command with all its children, and what it said on stderr."""
    before, began = os.times(), time.perf_counter()
    ran = subprocess.run(
        argv, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    seconds, after = time.perf_counter() - began, os.times()
    if ran.returncode:
        raise subprocess.CalledProcessError(ran.returncode, argv, None, ran.stderr)
    busy = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, busy, ran.stderr


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "low": round(min(values), 3),
        "high": round(max(values), 3),
    }


def main() -> int:
    """Print the result as JSON."""
    print(json.dumps(run(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
