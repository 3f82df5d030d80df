"""The GGUF reader: broken headers, and the cost of a vocabulary of 152k tokens that nobody asked for."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from claims import ROOT, CannotMeasure, Figure, claim

MUTATIONS = 20_000
TOKENS = 151_936
LIMIT_S = 0.1
LIMIT_MIB = 30.0

# In a process of its own: peak memory is a property of a process. One small header first, so that the imports
# of the reader are not counted as the vocabulary's. VmHWM rather than ru_maxrss, which starts at the peak of
# the process that started this one.
_READ = """
import json, re, sys, time
from pathlib import Path
from qnext.models.gguf_reader import read_header
def peak_kib():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))
small, large = map(Path, sys.argv[1:3])
read_header(small)
before = peak_kib()
began = time.perf_counter()
read_header(large)
seconds = time.perf_counter() - began
print(json.dumps({"seconds": seconds, "mib": (peak_kib() - before) / 1024}))
"""


@claim(
    "mutated-headers",
    "mutated GGUF headers: crashes, hangs or memory growth",
    bar=f"0 of {MUTATIONS:,}",
    minutes=2,
)
def measure_mutated_headers() -> Figure:
    # Also a command of its own, so that one broken case can be repeated.
    argv = [sys.executable, "-P", "-c",
            "import json, sys; sys.path.insert(0, 'scripts'); from fuzz_headers import run; "
            f"print(json.dumps(run({MUTATIONS}, 1)))"]  # fmt: skip
    ran = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(ran.stdout.splitlines()[-1])
    tried, crashes = int(result["tried"]), int(result["crashes"])
    detail = (
        f"{tried} tried, {result['accepted']} accepted, {result['rejected']} rejected, slowest "
        f"{result['slowest_ms']} ms, at most {result['peak_extra_bytes']} bytes beyond the file"
    )
    return Figure(crashes, "failures", crashes == 0 and tried >= MUTATIONS, detail)


@claim("vocabulary-time", "reading a header with 151,936 tokens", bar=f"under {LIMIT_S} s")
def measure_vocabulary_time() -> Figure:
    seconds, mib = _read_vocabulary()
    return Figure(seconds, "s", seconds < LIMIT_S, f"median of 5, {mib:.1f} MiB")


@claim("vocabulary-memory", "memory of reading a header with 151,936 tokens", bar=f"under {LIMIT_MIB:g} MiB")
def measure_vocabulary_memory() -> Figure:
    seconds, mib = _read_vocabulary()
    return Figure(
        mib, "MiB", mib < LIMIT_MIB, f"peak beyond the process before, largest of 5, {seconds:.3f} s"
    )


@cache
def _read_vocabulary() -> tuple[float, float]:
    """Median seconds and largest MiB of five processes that read it."""
    if not Path("/proc/self/status").exists():
        raise CannotMeasure("peak memory is read from /proc, so on Linux only")
    with tempfile.TemporaryDirectory() as scratch:
        small, large = Path(scratch) / "small.gguf", Path(scratch) / "large.gguf"
        _write_models(small, large)
        argv = [sys.executable, "-P", "-c", _READ, str(small), str(large)]
        runs = [
            json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
            for _ in range(5)
        ]
    return sorted(run["seconds"] for run in runs)[2], max(run["mib"] for run in runs)


def _write_models(small: Path, large: Path) -> None:
    """A model without tokens, and the same with tokens, types and merges of Qwen3-Next's lengths."""
    from tests.gguf_writing import I32, STR, array, build, sample_metadata, sample_tensors

    plain = {key: value for key, value in sample_metadata().items() if not key.startswith("tokenizer.")}
    small.write_bytes(build(plain, sample_tensors()).data)
    vocabulary = {
        "tokenizer.ggml.tokens": array(STR, [f"tok{n:05d}"[: 3 + n % 9] for n in range(TOKENS)]),
        "tokenizer.ggml.token_type": array(I32, [1] * TOKENS),
        "tokenizer.ggml.merges": array(STR, [f"a{n % 1000} b{n % 777}" for n in range(151_387)]),
    }
    large.write_bytes(build({**plain, **vocabulary}, sample_tensors()).data)
