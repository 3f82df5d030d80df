"""What Python costs in the token loop of a timed turn: a sweep must not measure itself.

The demo model speaks on one thread; each step's time is taken less the time inside the three native calls of
a step (sampling, llama_decode, llama_synchronize), clocked from Python around each call. What ctypes does to
make a call counts as the call's time; the clocks' own cost counts as Python's. The rest is the same for any
model: a step hands over one token and gets one back, whatever the vocabulary. The median step counts: on a
busy machine some steps hold what other programs took.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from claims import ROOT, CannotMeasure, Figure, claim

TOKEN_S = 0.020
STEPS, TURNS = 400, 5
_NATIVE = ("llama_sampler_sample", "llama_decode", "llama_synchronize")


@claim("python-share", "Python's own share of a decode step of 20 ms", bar="under 1 %")
def measure_python_share() -> Figure:
    from importlib.util import find_spec

    from qnext.models.synth import make_demo

    if find_spec("llama_cpp") is None:
        raise CannotMeasure("llama-cpp-python is not installed")
    with tempfile.TemporaryDirectory(prefix="qnext-claims-") as folder:
        model = Path(folder) / "demo.gguf"
        make_demo(model)
        argv = [sys.executable, "-m", "claims.python_share", str(model)]
        done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    own, whole = json.loads(done.stdout)
    middle, late = statistics.median(own) / 1e9, statistics.quantiles(own, n=20)[-1] / 1e9
    share = 100 * middle / TOKEN_S
    detail = (
        f"{middle * 1e6:.0f} µs in the middle of {len(own)} steps, {late * 1e6:.0f} µs at 95 % of them (the"
        f" demo, 1 thread, {statistics.median(whole) / 1e6:.1f} ms a step)"
    )
    return Figure(round(share, 2), "%", share < 1, detail)


def _clocked(call: Callable[..., Any], spent: list[int]) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        began = time.perf_counter_ns()
        result = call(*arguments)
        spent.append(time.perf_counter_ns() - began)
        return result

    return timed


def _take_turns(model: str) -> tuple[list[int], list[int]]:
    """Nanoseconds of each step outside the native calls, and in all."""
    from qnext.engine.llama import binding
    from qnext.engine.llama.runtime import Runtime
    from qnext.plan.values import Placement

    lib, spent = binding.llama(), list[int]()
    for name in _NATIVE:
        setattr(lib, name, _clocked(getattr(lib, name), spent))
    runtime = Runtime(lambda *_event, **_fields: None)
    runtime.open(model, asdict(Placement(threads=1, threads_batch=1, context=1024)))
    runtime.warm_up()
    own, whole = list[int](), list[int]()
    for _ in range(TURNS):
        spent.clear()
        done = runtime.turn(depth_tokens=[], prompt_tokens=[1, 2, 3], generate=STEPS)
        calls = spent[-len(_NATIVE) * STEPS :]
        for step, taken in enumerate(done["token_ns"]):
            native = sum(calls[step * len(_NATIVE) : (step + 1) * len(_NATIVE)])
            own.append(taken - native)
            whole.append(taken)
    runtime.close()
    return own, whole


if __name__ == "__main__":
    print(json.dumps(_take_turns(sys.argv[1])))
