"""Plans of models not downloaded: the headers of all quants of a repository, from a distant server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

from claims import ROOT, Figure, claim

REPO = "user/Qwen3-Next-80B-A3B-Instruct-GGUF"
QUANTS = (
    *("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ4_XS", "Q4_0"),
    *("Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "BF16"),
)
LATENCY_S = 0.03
LIMIT_S = 3.0
LIMIT_BYTES = 12_000_000
LIMIT_KEPT_S = 1.0

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
    "remote-headers-time",
    f"headers of {len(QUANTS)} quants of an 80B model from a server {LATENCY_S * 1000:.0f} ms away",
    bar=f"under {LIMIT_S:g} s",
)
def measure_remote_headers_time() -> Figure:
    first, _, _ = _read_repository()
    return Figure(first, "s", first < LIMIT_S, "median of 3 processes, imports included, nothing kept before")


@claim(
    "remote-headers-bytes",
    f"bytes fetched of one file for the headers of {len(QUANTS)} quants of an 80B model",
    bar=f"under {LIMIT_BYTES / 1e6:g} MB per file",
)
def measure_remote_headers_bytes() -> Figure:
    _, _, sent = _read_repository()
    detail = f"the largest of {len(sent)} files; all together {sum(sent) / 1e6:.1f} MB"
    return Figure(max(sent) / 1e6, "MB", max(sent) < LIMIT_BYTES, detail)


@claim(
    "kept-headers-time",
    f"the same headers once they are kept, {len(QUANTS)} quants",
    bar=f"under {LIMIT_KEPT_S:g} s",
)
def measure_kept_headers_time() -> Figure:
    _, again, _ = _read_repository()
    return Figure(again, "s", again < LIMIT_KEPT_S, "median of 3 processes, imports and one request included")


@cache
def _read_repository() -> tuple[float, float, list[int]]:
    """Seconds of the first reading and of one from the cache, and the bytes sent of each file at first."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "served" / REPO
        folder.mkdir(parents=True)
        for quant in QUANTS:
            _run("-m", "qnext", "synth", "qwen3-next-80b-a3b", "--quant", quant, "--header-only",
                 "-o", str(folder / f"Qwen3-Next-80B-A3B-Instruct-{quant}.gguf"))  # fmt: skip
        argv = [sys.executable, "-m", "tests.hub_server", str(Path(scratch) / "served"), str(LATENCY_S)]
        server = subprocess.Popen(
            argv,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            endpoint = server.stdout.readline().strip()
            first, again, sent = [], [], Counter[str]()
            for turn in range(3):
                kept = str(Path(scratch) / f"kept{turn}")
                first.append(_seconds(endpoint, scratch, kept))
                if turn == 0:
                    server.stdin.write("\n")
                    server.stdin.flush()
                    for answer in json.loads(server.stdout.readline()):
                        if answer["at"] == "cdn":
                            sent[answer["path"]] += answer["sent"]
                again.append(_seconds(endpoint, scratch, kept))
        finally:
            server.stdin.close()
            server.wait(timeout=10)
    return sorted(first)[1], sorted(again)[1], list(sent.values())


def _seconds(endpoint: str, scratch: str, kept: str) -> float:
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(Path(scratch) / "hf"), "NO_PROXY": "*"}
    return float(_run("-c", _READ, REPO, kept, str(len(QUANTS)), environment=environment))


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
