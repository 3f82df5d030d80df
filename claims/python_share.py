"""What Python costs in the token loop of a timed turn: a sweep must not measure itself.

The demo model speaks on one thread; each step's time is taken less the time inside the three native calls of
a step (sampling, llama_decode, llama_synchronize), clocked from Python around each call. What ctypes does to
make a call counts as the call's time; the clocks' own cost counts as Python's. The rest is the same for any
model: a step hands over one token and gets one back, whatever the vocabulary.
"""

from __future__ import annotations

import json
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
    turns: list[tuple[float, float]] = json.loads(done.stdout)
    own = sorted(own for own, _ in turns)
    share = 100 * own[-1] / TOKEN_S
    detail = (
        f"{own[0] * 1e6:.0f} to {own[-1] * 1e6:.0f} µs a token in {TURNS} turns of {STEPS} tokens (the demo,"
        f" 1 thread, {min(step for _, step in turns) * 1e3:.1f} ms a token); the slowest turn counts"
    )
    return Figure(round(share, 2), "%", share < 1, detail)


def _clocked(call: Callable[..., Any], spent: list[int]) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        began = time.perf_counter_ns()
        result = call(*arguments)
        spent.append(time.perf_counter_ns() - began)
        return result

    return timed


def _take_turns(model: str) -> list[tuple[float, float]]:
    """Seconds per token outside the native calls, and in all, for each turn."""
    from qnext.engine.llama import binding
    from qnext.engine.llama.runtime import Runtime
    from qnext.plan.values import Placement

    lib, spent = binding.llama(), list[int]()
    for name in _NATIVE:
        setattr(lib, name, _clocked(getattr(lib, name), spent))
    runtime = Runtime(lambda *_event, **_fields: None)
    runtime.open(model, asdict(Placement(threads=1, threads_batch=1, context=1024)))
    runtime.warm_up()
    found = []
    for _ in range(TURNS):
        spent.clear()
        done = runtime.turn(depth_tokens=[], prompt_tokens=[1, 2, 3], generate=STEPS)
        native = sum(spent[-len(_NATIVE) * STEPS :])
        steps = sum(done["token_ns"])
        found.append(((steps - native) / STEPS / 1e9, steps / STEPS / 1e9))
    runtime.close()
    return found


if __name__ == "__main__":
    print(json.dumps(_take_turns(sys.argv[1])))
