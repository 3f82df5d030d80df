"""Many texts on one context: what each step evaluates, and what becomes of the texts.

Each step is one llama_decode with the latest token of every running text and a chunk of at most a ubatch of
prompts (`scheduler`), then one token chosen for each text whose logits came out of it, then one frame to the
parent. What the sequences hold is `prompt_cache`'s.
"""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np

from qnext.engine.llama.batch import Batch
from qnext.engine.llama.binding import EngineFailure, logits_address
from qnext.engine.llama.context import Context
from qnext.engine.llama.job import Job
from qnext.engine.llama.prompt_cache import WORTH_WAITING, Held, PromptCache
from qnext.engine.llama.sampler import DeadEnd, Logits, log_probabilities
from qnext.engine.llama.scheduler import ChunkPolicy, Waiting
from qnext.engine.llama.signals import Signals
from qnext.engine.llama.vocabulary import Vocabulary

_NO_ROOM = 1
"""What llama_decode returns when the cache has no place for the batch; nothing was evaluated then."""


@dataclass(slots=True)
class Totals:
    """Counts since the loop began. `busy_slots_sum` adds up the texts that took part in each step.

    `prompt_ns` is the time of steps with a chunk of a prompt in them, `decode_ns` that of the others, and
    `native_ns` what llama_decode took of both.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompt_ns: int = 0
    generated: int = 0
    decode_ns: int = 0
    steps: int = 0
    busy_slots_sum: int = 0
    native_ns: int = 0


class Batcher:
    """The texts on `context`: `add` them, `step` until there is no `work`. Events go to `signals.stream`."""

    def __init__(
        self,
        context: Context,
        vocabulary: Vocabulary,
        signals: Signals,
        *,
        model: Any,
        cache_bytes: int,
        stall_s: float,
    ) -> None:
        placement, active = context.placement, context.active()
        self._context = context
        self._vocabulary = vocabulary
        self._signals = signals
        self._cache = PromptCache(
            model,
            context.handle,
            sequences=placement.parallel,
            limit=context.limit,
            unified=placement.kv_unified,
            swa_full=placement.swa_full,
            budget_bytes=cache_bytes,
        )
        self._batch = Batch(active["batch"], placement.parallel)
        self._policy = ChunkPolicy(min(active["ubatch"], active["batch"]), stall_s)
        self._suppressed = np.array(vocabulary.suppressed(), np.int64)
        self._ending = frozenset(vocabulary.enders())
        self._enders = np.array(sorted(self._ending), np.int64)
        self._rows = _LogitRows(context.handle, placement.parallel, vocabulary.size)
        self._pieces: dict[int, bytes] = {}
        self._queue: deque[Job] = deque()
        self._active: dict[int, Job] = {}
        self.totals = Totals()

    @property
    def work(self) -> bool:
        """Whether a text is under way or waits."""
        return bool(self._active or self._queue)

    def jobs(self) -> Iterator[Job]:
        """All texts, those that wait last."""
        yield from self._active.values()
        yield from self._queue

    def add(self, job: Job) -> None:
        """Let a text wait for its turn."""
        self._queue.append(job)

    def state(self) -> dict[str, Any]:
        """Slots, queue, cache and totals as plain values."""
        return {
            "slots": [self._slot_told(held) for held in self._cache.sequences],
            "queued": len(self._queue),
            "cache": {
                "bytes": self._cache.nbytes,
                "budget_bytes": self._cache.budget_bytes,
                "entries": self._cache.entries,
            },
            "totals": asdict(self.totals),
        }

    def _slot_told(self, held: Held) -> dict[str, int | None]:
        job = self._active.get(held.index)
        return {
            "slot": held.index,
            "id": job.asked.id if job else None,
            "prompt": len(job.asked.tokens) if job else 0,
            "done": min(held.count, len(job.asked.tokens)) if job else 0,
            "generated": job.generated if job else 0,
            "cached": job.cached if job else 0,
            "held": held.count,
        }

    # --- one step -------------------------------------------------------------------------------------

    def step(self) -> None:
        """Evaluate once, and tell what came of it."""
        for job in [job for job in self.jobs() if job.overdue]:
            self.end(job, "deadline")
        self._begin_jobs()
        running = [job for job in self._active.values() if job.pending is not None]
        waiting = {index: job for index, job in self._active.items() if job.pending is None}
        shares = dict(self._policy.share([self._waiting(job) for job in waiting.values()], len(running)))
        if not running and not shares:
            return
        started = time.perf_counter_ns()
        if not self._decode(shares):
            return
        chunk = sum(shares.values())
        outputs = self._take_in(shares)
        self.totals.steps += 1
        self.totals.busy_slots_sum += len(running) + len(shares)
        self.totals.prompt_tokens += chunk
        self._choose(outputs)
        spent = time.perf_counter_ns() - started
        if chunk:
            self.totals.prompt_ns += spent
            if outputs:
                self._policy.learn(chunk + len(running), spent / 1e9)
        else:
            self.totals.decode_ns += spent
        self._signals.sign_of_life()

    def _waiting(self, job: Job) -> Waiting:
        assert job.held is not None
        remaining = len(job.asked.tokens) - job.held.count
        until = job.pauses[0] - job.held.count if job.pauses else remaining
        return Waiting(job.held.index, remaining, until)

    def _begin_jobs(self) -> None:
        """Give free sequences to those that wait, in the order they came."""
        free = len(self._cache.sequences) - len(self._active)
        for job in list(islice(self._queue, 2 * free)):
            if len(self._active) == len(self._cache.sequences) or self._had_better_wait(job):
                continue
            self._queue.remove(job)
            asked = job.asked
            job.held = held = self._cache.take(asked.tokens, reuse=asked.cache)
            job.cached = held.count
            job.began_ns = time.perf_counter_ns()
            job.pauses = self._cache.pauses(held, len(asked.tokens), asked.boundaries) if asked.cache else []
            left = self._context.limit - len(asked.tokens) + 1  # the last token is chosen, not evaluated
            job.room = left if asked.max_tokens is None else min(left, asked.max_tokens)
            self._active[held.index] = job
            self.totals.cached_tokens += job.cached
            self._signals.stream(
                "begun",
                id=asked.id,
                slot=held.index,
                prompt_tokens=len(asked.tokens),
                cached_tokens=job.cached,
                queued_ns=job.queued_ns,
            )

    def _had_better_wait(self, job: Job) -> bool:
        """Whether a prompt under evaluation is about to have much of this one's beginning done."""
        if not job.asked.cache:
            return False
        prompt, coming = job.asked.tokens, 0
        for other in self._active.values():
            if other.pending is None and other.held is not None:
                coming = max(coming, self._cache.coming_reach(other.asked.tokens, other.pauses, prompt))
        return coming >= WORTH_WAITING and coming >= self._cache.best_reach(prompt) + WORTH_WAITING

    def _fill(self, shares: dict[int, int]) -> None:
        """The step's batch, in the order of sequences: only rising neighbours are evaluated together."""
        batch = self._batch
        batch.clear()
        for index in sorted(self._active):
            job = self._active[index]
            held = job.held
            assert held is not None
            if job.pending is not None:
                batch.add(index, job.pending, held.count)
            elif index in shares:
                end = held.count + shares[index]
                batch.extend(
                    index, job.asked.tokens[held.count : end], held.count, output=end == len(job.asked.tokens)
                )

    def _decode(self, shares: dict[int, int]) -> bool:
        """Evaluate the step; False if it could not be and something was given up to make room."""
        self._fill(shares)
        began = time.perf_counter_ns()
        status = self._batch.decode(self._context.handle)
        self.totals.native_ns += time.perf_counter_ns() - began
        if status == 0:
            return True
        if status == _NO_ROOM:
            if self._cache.clear_free():
                return False
            index = max(shares or self._active, key=lambda index: self._active[index].arrived_ns)
            self.end(self._active[index], "context", message="the context of all sequences together is full")
            self._cache.clear(self._cache.sequences[index])
            return False
        self._signals.check()
        raise EngineFailure("decode", f"llama_decode failed with status {status}")

    def _take_in(self, shares: dict[int, int]) -> list[Job]:
        """Note what has been evaluated; returns the jobs whose logits came out, in the order of these."""
        outputs = []
        for index in sorted(self._active):
            job = self._active[index]
            held = job.held
            assert held is not None
            if job.pending is not None:
                held.append_one(job.pending)
                outputs.append(job)
            elif index in shares:
                held.append(job.asked.tokens[held.count : held.count + shares[index]])
                if held.count == len(job.asked.tokens):
                    outputs.append(job)
                elif job.pauses and job.pauses[0] == held.count:
                    job.pauses.pop(0)
                    self._cache.checkpoint(held)
                elif job.asked.cache and self._cache.checkpoint_is_due(held, len(job.asked.tokens)):
                    self._cache.checkpoint(held)
        return outputs

    # --- tokens ---------------------------------------------------------------------------------------

    def _choose(self, jobs: list[Job]) -> None:
        """Choose the next token of each of `jobs`, tell the parent, and end those that are done."""
        if not jobs:
            return
        rows = self._rows.latest(len(jobs))
        if len(self._suppressed):
            rows[:, self._suppressed] = -np.inf
        now = time.perf_counter_ns()
        told: list[list[object]] = []
        ended: list[tuple[Job, str]] = []
        for row, job in zip(rows, jobs, strict=True):
            if job.must_go_on:
                row[self._enders] = -np.inf
            try:
                token = job.choose(row)
            except DeadEnd:
                ended.append((job, "eos" if job.must_go_on else "error"))
                continue
            if not job.first_ns:
                job.first_ns = now
            job.last_ns = now
            job.pending = token
            job.generated += 1
            if token in self._ending:
                ended.append((job, "eos"))
                continue
            told.append(self._entry(job, token, row))
            if job.text.stopped:
                ended.append((job, "stop"))
            elif job.generated >= job.room:
                ended.append((job, "length" if job.room == job.asked.max_tokens else "context"))
        self.totals.generated += len(jobs)
        if told:
            self._signals.stream("step", out=told)
        for job, reason in ended:
            self.end(job, reason, message="the grammar allows no token" if reason == "error" else None)

    def _entry(self, job: Job, token: int, row: Logits) -> list[object]:
        """What the parent hears of a token: id, text, token, log-probability, the best ones, its bytes."""
        piece = self._piece(token)
        text = job.text.feed(piece)
        if job.asked.logprobs is None:
            return [job.asked.id, text, token, None, None]
        own, best = log_probabilities(row, token, job.asked.logprobs)
        top = [[other, self._piece(other).decode("latin-1"), value] for other, value in best]
        return [job.asked.id, text, token, own, top, piece.decode("latin-1")]

    def _piece(self, token: int) -> bytes:
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._vocabulary.piece(token)
        return piece

    def end(self, job: Job, reason: str, *, message: str | None = None) -> None:
        """Tell the parent that `job` is over, and give its sequence to the next."""
        job.sampler.free()
        if job.held is None:
            self._queue.remove(job)
        else:
            del self._active[job.held.index]
            self._cache.release(job.held)
        rest = "" if job.text.stopped else job.text.feed(b"", final=True)
        self._signals.stream(
            "ended",
            id=job.asked.id,
            reason=reason,
            text=rest,
            prompt_tokens=len(job.asked.tokens),
            cached_tokens=job.cached,
            generated=job.generated,
            prefill_ns=job.prefill_ns,
            decode_ns=job.decode_ns,
            queued_ns=job.queued_ns,
            stop_text=job.text.stop_text,
            message=message,
        )


class _LogitRows:
    """llama.cpp's logits of the last step as numpy sees them, one row per token that was to have some."""

    def __init__(self, context: Any, most: int, vocabulary: int) -> None:
        self._context = context
        self._shape = (most, vocabulary)
        self._address: int | None = None
        self._rows: Logits = np.empty((0, vocabulary), np.float32)

    def latest(self, count: int) -> Logits:
        """The first `count` rows, valid until the next step."""
        address = logits_address(self._context)
        if not address:
            raise EngineFailure("decode", "llama.cpp has no logits for the step")
        if address != self._address:
            pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_float))
            self._rows = np.ctypeslib.as_array(pointer, self._shape)
            self._address = address
        return self._rows[:count]
