"""How long the README's test command takes once the engine is compiled."""

from __future__ import annotations

import os
import subprocess
import time

from claims import ROOT, Figure, claim

LIMIT_S = 300.0


@claim("default-tests", "`scripts/test`, engine compiled", bar="under 5 min on 2 cores", minutes=4)
def measure_default_tests() -> Figure:
    began = time.monotonic()
    ran = subprocess.run(
        [str(ROOT / "scripts" / "test")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    seconds = time.monotonic() - began
    last = ran.stdout.strip().splitlines()[-1] if ran.stdout.strip() else f"status {ran.returncode}"
    detail = f"{last}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    return Figure(seconds / 60, "min", ran.returncode == 0 and seconds < LIMIT_S, detail)
