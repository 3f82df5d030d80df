"""What the engine child times: llama-bench's tests, and whole turns of a conversation.

Both mean the same by prefill and decode, and the same as llama-bench. Prefill is the evaluation of the prompt
in pieces of `batch` tokens, up to the point where the device has finished. A decode step is the evaluation of
one token up to the same point; the first token that a model says comes out of the prefill and costs no step,
so `generate` steps evaluate `generate` tokens. A turn differs in three things: its prompt is text instead of
random tokens, each token is what the model says next instead of a random one, and a step holds the sampling.
"""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from qnext.engine.llama import binding
from qnext.engine.llama.binding import EngineFailure
from qnext.engine.llama.context import Context
from qnext.engine.llama.sampling import sampler_chain
from qnext.engine.llama.signals import OutOfTime, Signals
from qnext.plan.values import Placement

STATES_KEPT = 2
"""Copies of evaluated depths: one for a baseline and one for what is compared with it."""


class DepthStates:
    """What a context holds after its depth, kept in host memory so that it is evaluated only once.

    A copy takes as much as the cache of so many tokens and the recurrent state. It fits any context of the
    same model whose cache has the same types and layout.
    """

    def __init__(self) -> None:
        self._copies: OrderedDict[object, Any] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Host memory that they take."""
        return sum(len(copy) for copy in self._copies.values())

    def clear(self) -> None:
        """Forget all of them: another model comes."""
        self._copies.clear()

    def keep(self, context: Context) -> None:
        """Copy what `context` holds now; the oldest copy goes. Without room for one, nothing is kept."""
        while len(self._copies) >= STATES_KEPT:
            self._copies.popitem(last=False)
        copy = context.memory.copy_all()
        if copy is not None:
            self._copies[_state_key(context.placement, context.memory.tokens)] = copy

    def restore(self, context: Context, tokens: Sequence[int]) -> bool:
        """Make `context` hold `tokens`, if there is a copy of them that fits; it is empty otherwise."""
        key = _state_key(context.placement, tokens)
        copy = self._copies.get(key)
        if copy is None:
            return False
        self._copies.move_to_end(key)
        return context.memory.put_back(copy, tokens)


def _state_key(placement: Placement, tokens: Sequence[int]) -> object:
    """What has to be the same for a copy to fit (llama_kv_cache::state_read and its relatives)."""
    return (
        tuple(tokens),
        placement.kv_type_k,
        placement.kv_type_v,
        placement.flash_attention,  # without it values lie transposed
        placement.parallel,
        placement.kv_unified,
        placement.swa_full,
        placement.recurrent_rollback,
    )


@dataclass(slots=True)
class _Turn:
    """What has been timed so far."""

    depth_ns: int | None = None
    began_ns: int = 0
    prefill_ns: int | None = None
    prompt: int = 0
    token_ns: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    stopped: bool = False


def turn(
    context: Context,
    signals: Signals,
    depths: DepthStates,
    *,
    depth_tokens: list[int],
    prompt_tokens: list[int],
    generate: int,
    limit_s: float | None = None,
    depth_limit_s: float | None = None,
    sampling: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Time one turn; `EngineSession.turn` says what of it and what comes back. The memory is empty after it.

    Raises EngineFailure (`empty`, `context_full`) before anything is evaluated.
    """
    needed = len(depth_tokens) + len(prompt_tokens) + generate
    if not prompt_tokens:
        raise EngineFailure("empty", "the prompt is empty")
    if needed > context.limit:
        raise EngineFailure("context_full", f"the turn is {needed} tokens long, the context {context.limit}")
    done, faults = _Turn(), _major_faults()
    context.memory.clear()
    try:
        with signals.time_limit(depth_limit_s):
            done.depth_ns = _take_depth(context, depths, depth_tokens)
        faults = _major_faults()
        with signals.time_limit(limit_s):
            _prefill(context, done, prompt_tokens)
            _decode(context, done, generate, sampling or {})
    except OutOfTime:
        done.stopped = True
    finally:
        context.memory.clear()
    faults_after = _major_faults()
    return {
        **asdict(done),
        "rss_bytes": _resident_bytes(),
        "state_bytes": depths.nbytes,
        "major_faults": None if faults is None or faults_after is None else faults_after - faults,
    }


def _take_depth(context: Context, depths: DepthStates, tokens: Sequence[int]) -> int | None:
    """Make the empty `context` hold `tokens`; ns if they had to be evaluated."""
    if not tokens or depths.restore(context, tokens):
        return None
    started = time.perf_counter_ns()
    context.decode_in_batches(tokens)
    elapsed = time.perf_counter_ns() - started
    depths.keep(context)
    return elapsed


def _prefill(context: Context, done: _Turn, tokens: Sequence[int]) -> None:
    before = len(context.memory.tokens)
    done.began_ns = time.perf_counter_ns()
    try:
        context.decode_in_batches(tokens)
    except OutOfTime:
        context.synchronize()
        raise
    finally:
        done.prefill_ns = time.perf_counter_ns() - done.began_ns
        done.prompt = context.memory.evaluated - before


def _decode(context: Context, done: _Turn, count: int, sampling: dict[str, float]) -> None:
    sample = binding.llama().llama_sampler_sample
    chain = sampler_chain(sampling)
    last = time.perf_counter_ns()
    try:
        for _ in range(count):
            token = sample(chain, context.handle, -1)
            context.decode([token])
            context.synchronize()
            now = time.perf_counter_ns()
            done.token_ns.append(now - last)
            done.tokens.append(token)
            last = now
    finally:
        binding.llama().llama_sampler_free(chain)


def _major_faults() -> int | None:
    """Times so far that this process waited for the disk to bring a page of memory; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def _resident_bytes() -> int:
    """Memory of this process that is in RAM now, mapped files included."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def bench(
    context: Context,
    signals: Signals,
    vocabulary: int,
    *,
    prompt: int,
    generate: int,
    depth: int,
    repetitions: int,
    warmup: bool = True,
    seed: int = 1,
) -> dict[str, Any]:
    """llama-bench's test on a fresh `context`: one uncounted warm-up, then `repetitions` timed runs.

    Prompt tokens are random and go in `batch`-sized pieces; generation feeds one random token at a time and
    synchronises after each. `depth` tokens are evaluated first, their state kept and restored for the later
    runs. Streams a `sample` event (ns) as each run ends.
    """
    context.use_own_threads()
    tokens = _random_tokens(vocabulary, random.Random(seed))
    saved: Any = None
    samples: list[int] = []

    def run(prompt: int, generate: int) -> None:
        context.decode_in_batches(list(islice(tokens, prompt)))
        for token in islice(tokens, generate):
            context.decode([token])
            context.synchronize()

    if warmup:
        run(prompt, min(generate, 1))
    for _ in range(repetitions):
        context.memory.clear()
        if depth and saved is None:
            run(depth, 0)
            saved = context.memory.copy_all()
        elif depth:
            context.memory.put_back(saved, ())
        started = time.perf_counter_ns()
        run(prompt, generate)
        samples.append(time.perf_counter_ns() - started)
        signals.stream("sample", ns=samples[-1])
    return {"samples_ns": samples}


def _random_tokens(vocabulary: int, source: random.Random) -> Iterator[int]:
    while True:
        yield source.randrange(vocabulary)
