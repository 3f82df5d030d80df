"""The llama-server line of a plan does what the plan says: the real server takes it, allocates the same."""

from __future__ import annotations

import subprocess

from claims import ROOT, CannotMeasure, Figure, claim, run_script


@claim(
    "server-line",
    "llama-server started with the plans' lines: allocated against planned, CPU and CPU + RPC",
    bar="0 differences",
)
def measure_server_line() -> Figure:
    peers = subprocess.run(
        [str(ROOT / "scripts" / "peers")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    server = next((line for line in peers.stdout.splitlines() if line.endswith("llama-server")), None)
    if server is None:
        raise CannotMeasure("needs llama-server: run scripts/peers")
    differences: dict[str, list[str]] = run_script("check_server_line.py", server)
    found = [f"{case}: {text}" for case, texts in differences.items() for text in texts]
    return Figure(len(found), "differences", not found, "; ".join(found) or f"{len(differences)} plans")
