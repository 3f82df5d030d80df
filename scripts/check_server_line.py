"""Starts the real llama-server with the command lines of plans and compares what it allocates with the plan.

Needs scripts/peers. For each case the plan is made through `qnext plan --json`, its command line is run, and
the buffers that the server logs are compared with the plan's devices: weights, cache and state to the print
resolution, the compute buffers within 1 %. Run: `.venv/bin/python scripts/check_server_line.py LLAMA_SERVER`.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from qnext.engine.log_reader import PRINT_RESOLUTION_BYTES, allocated_devices, read_buffer_sizes  # noqa: E402
from qnext.engine.rpc import RpcWorker, free_port  # noqa: E402
from qnext.models.synth import synthesise  # noqa: E402
from qnext.plan.values import Budget  # noqa: E402

BASE = ["-c", "2048", "-ub", "256", "-t", "1", "--repack", "off"]
CASES: dict[str, list[str]] = {
    "CPU alone": [],
    "CPU alone, eight-bit cache, 4 slots": ["-ctk", "q8_0", "-ctv", "q8_0", "-np", "4"],
    "all on the device": ["--device-memory", "RPC0=1G"],
    "tail experts on the CPU": ["--device-memory", "RPC0=20M"],
    "--n-cpu-moe": ["--device-memory", "RPC0=1G", "-ncmoe", "3"],
    "--cpu-moe": ["--device-memory", "RPC0=1G", "-cmoe"],
    "few layers": ["--device-memory", "RPC0=9M"],
}
START_LIMIT_S = 60


def run(server: str) -> dict[str, list[str]]:
    """What differs, by case; empty lists where the server did as planned."""
    differences = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tiny.gguf"
        synthesise("tiny-qwen3next", model, quant="Q4_K_M", header_only=True)
        for case, flags in CASES.items():
            with RpcWorker() as worker:
                remote = ["--rpc", worker.endpoint] if "--device-memory" in flags else []
                plan = _plan([str(model), *BASE, *flags, *remote])
                log = _serve([server, *plan["llama_server_argv"][1:]], Path(folder) / "server.log")
            differences[case] = _compare(plan, log)
    return differences


def _plan(arguments: list[str]) -> dict[str, Any]:
    argv = [sys.executable, "-m", "qnext", "plan", *arguments, "--json"]
    ran = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    plan: dict[str, Any] = json.loads(ran.stdout)
    return plan


def _serve(argv: list[str], log: Path) -> list[str]:
    """The server's log up to the moment it answers, or ends."""
    port = free_port()
    extra = ["--host", "127.0.0.1", "--port", str(port), "--no-warmup", "--log-verbosity", "4"]
    with log.open("w") as out:
        process = subprocess.Popen([*argv, *extra], stdout=out, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + START_LIMIT_S
            while process.poll() is None and time.monotonic() < deadline:
                with (
                    contextlib.suppress(OSError),
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1),
                ):
                    break
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    return log.read_text(errors="replace").splitlines()


def _compare(plan: dict[str, Any], log: list[str]) -> list[str]:
    sizes = read_buffer_sizes(log)
    if not sizes:
        return ["the server did not start: " + " / ".join(log[-3:])]
    endpoint = plan["placement"]["rpc_servers"]
    budgets = {
        one["name"]: Budget(
            one["name"],
            one["kind"],
            one["budget_bytes"],
            f"RPC0[{endpoint[0]}]" if one["kind"] == "rpc" else one["name"],
        )
        for one in plan["devices"]
    }
    found = []
    for planned, real in zip(plan["devices"], allocated_devices(sizes, budgets), strict=True):
        for part in ("weights", "kv", "recurrent", "compute"):
            want, got = planned[f"{part}_bytes"], getattr(real, f"{part}_bytes")
            allowed = 3 * PRINT_RESOLUTION_BYTES + (want // 100 if part == "compute" else 0)
            if abs(want - got) > allowed:
                found.append(f"{planned['name']} {part}: planned {want}, allocated {got}")
    return found


def main() -> int:
    """Print the differences as JSON; status 1 when there are any."""
    if len(sys.argv) != 2:
        print("usage: check_server_line.py LLAMA_SERVER (scripts/peers prints its path)", file=sys.stderr)
        return 2
    differences = run(sys.argv[1])
    print(json.dumps(differences, indent=1))
    return 1 if any(differences.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
