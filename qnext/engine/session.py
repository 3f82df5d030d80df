"""A session on the engine: what can be asked of the child that runs llama.cpp, and what it answers.

How the child is kept and what becomes of it is `qnext.engine.process`; what it does, `qnext.engine.llama`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, cast

from qnext.engine.log_reader import BufferSize, read_buffer_sizes
from qnext.engine.process import EngineProcess
from qnext.engine.protocol import Message
from qnext.plan.values import Placement

SILENT_TOKENS = 600
"""What a benchmark may decode within the limit on silence: one token a second by default."""


class EngineSession(EngineProcess):
    """One engine child with at most one model open. Use as a context manager.

    An answer that streams must be read to its end or closed before the next request.
    """

    _batch = 0

    def describe(self, rpc_servers: tuple[str, ...] = ()) -> Message:
        """Devices, buffer types and build features of the installed engine."""
        return self._request("looking at the engine", {"op": "describe", "rpc_servers": list(rpc_servers)})

    def open(
        self,
        model: str,
        placement: Placement,
        *,
        context: int | None = None,
        on_progress: Callable[[float], None] | None = None,
    ) -> Message:
        """Load `model` as placed. `on_progress` gets the share loaded, 0 to 1.

        Returns what is active: context, context_per_sequence, batch, ubatch (tokens), threads, threads_batch,
        flash_attention (`on`, `off`, None where the log does not say); facts of the model and the build:
        vocabulary (tokens), bos, eos, model_desc, system_info; and load_ns.
        """
        self._log.forget()
        request: Message = {
            "op": "open",
            "model": model,
            "placement": asdict(placement),
            "context": context,
        }
        return self._active(self._request("loading the model", request, on_progress=on_progress))

    def renew(self, placement: Placement, *, context: int | None = None) -> Message:
        """A new context on the open model, made from the context part of `placement`; returns as `open` does.

        The model part (`qnext.engine.llama.params.model_part`) must be that of the open model, or this is
        refused and nothing changes. `context` replaces the total of tokens. The old context is freed first,
        since both may not fit; when llama.cpp cannot make the new one, that is an EngineCrashError of kind
        `refused`, the model stays open, and another `renew` may follow. What the first use of a context costs
        is not paid here: call `warm_up` before timing. `size_lines` then tell what is allocated now.
        """
        request: Message = {"op": "renew", "placement": asdict(placement), "context": context}
        return self._active(self._request("making a context", request))

    def _active(self, facts: Message) -> Message:
        self._batch = int(str(facts["batch"]))
        return {**facts, "flash_attention": self._log.flash_attention}

    def warm_up(self) -> None:
        """Decode a few tokens and forget them, so that a layout that crashes does so now."""
        self._request("trying the first tokens", {"op": "warm_up"})

    def dry_run(self, model: str, placement: Placement) -> list[BufferSize]:
        """Simulate the allocation without reading weights; returns what a load would allocate (weights 0)."""
        self._log.forget()
        request: Message = {"op": "dry_run", "model": model, "placement": asdict(placement)}
        compute = self._request("planning memory", request)["compute"]
        sizes = read_buffer_sizes(self.size_lines)
        if compute is None:
            return sizes
        reserved = cast("list[tuple[str, int]]", compute)
        return [
            *(size for size in sizes if size.part != "compute"),
            *(BufferSize(buffer, "compute", size) for buffer, size in reserved),
        ]

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`, control tokens recognised."""
        reply = self._request("tokenising", {"op": "tokenize", "text": text})
        return cast("list[int]", reply["tokens"])

    def generate(
        self, text: str, *, max_tokens: int, sampling: dict[str, float], **options: Any
    ) -> Iterator[Message]:
        """Continue `text`: yields `prefill` and `token` events, last a `done` event with the counts."""
        request = {"op": "generate", "text": text, "max_tokens": max_tokens, "sampling": sampling, **options}
        yield from self._run("generating", request)

    def bench(
        self, *, prompt: int, generate: int, depth: int, repetitions: int, **options: Any
    ) -> Iterator[Message]:
        """Time one test: yields `sample` events (ns) as runs end, last a `done` event with all of them."""
        request = {
            "op": "bench",
            "prompt": prompt,
            "generate": generate,
            "depth": depth,
            "repetitions": repetitions,
            **options,
        }
        yield from self._run("benchmarking", request, silence_limit_s=self._batch_silence_limit_s)

    def turn(
        self,
        *,
        depth_tokens: list[int],
        prompt_tokens: list[int],
        generate: int,
        limit_s: float | None = None,
        depth_limit_s: float | None = None,
        sampling: dict[str, float] | None = None,
    ) -> Message:
        """One timed turn on the present context, which is empty before and after it.

        `depth_tokens` come first and are not timed as part of the turn: they are evaluated once, and their
        state is kept in the child's memory and put back for later turns with the same depth, across `renew`
        and across `open` of the same file (the latest two, for contexts alike in cache types, flash
        attention, sequences and sliding windows). Then `prompt_tokens` (at least one) are evaluated in
        batches, then `generate` tokens one by one, each what the model says next (greedy, or as `sampling`
        with its `seed` has it), with no regard to end-of-generation tokens.

        Returns
        - depth_ns: time to evaluate the depth, None when there is none or its state was put back;
        - began_ns: when the prefill began, on `time.perf_counter_ns` of the child (on Linux also ours);
        - prefill_ns: from the first prompt token until the last is computed; `prompt`: tokens evaluated;
        - token_ns: one time per decode step: sampling a token, evaluating it, waiting until it is computed;
        - tokens: the ids of those tokens, of which the first comes out of the prefill;
        - rss_bytes: the child's memory in RAM at the end, mapped files included, and state_bytes with it;
        - state_bytes: what the kept states of depths take in the child's memory;
        - major_faults: of the child from prefill to end (pages waited for on disk), None where not told;
        - stopped: whether `limit_s` ran out (prefill and decode together) or `depth_limit_s` (the depth).

        Prefill and decode are llama-bench's pp and tg, up to these: the prompt is given, each step samples,
        and the threads are those of `generate`, where llama-bench has a pool of its own. When stopped,
        `prompt` counts the tokens of whole batches evaluated within prefill_ns (None when the depth was not
        finished), and token_ns holds the steps that were finished. The CPU stops within a moment, a device
        after its batch. Ctrl-C cancels as in `bench`. A turn that does not fit into the context is refused
        (EngineCrashError of kind `refused`).
        """
        request: Message = {
            "op": "turn",
            "depth_tokens": depth_tokens,
            "prompt_tokens": prompt_tokens,
            "generate": generate,
            "limit_s": limit_s,
            "depth_limit_s": depth_limit_s,
            "sampling": sampling,
        }
        return self._request("timing a turn", request, silence_limit_s=self._batch_silence_limit_s)

    def serve(self, options: Message, *, at_work_since: Callable[[], float | None]) -> Iterator[Message]:
        """Run the child's serving loop: yields its events, last a `done` event once it was told to stop.

        Requests to the loop go through `send` (`ServingEngine` does both). Silence counts from
        `at_work_since` (time.monotonic), and not while that is None.
        """
        request: Message = {"op": "serve", **options}
        limit = self._batch_silence_limit_s
        yield from self._run("serving", request, silence_limit_s=limit, at_work_since=at_work_since)

    @property
    def _batch_silence_limit_s(self) -> float:
        """A batch is decoded in one call that cannot speak meanwhile: the limit counts for so many tokens."""
        return self._silence_limit_s * max(1.0, self._batch / SILENT_TOKENS)

    def time_copies(self, device: str, *, limit_s: float, **options: Any) -> Message:
        """Time copies between host and `device` (`engine.llama.link`); the child is ended after `limit_s`."""
        request = {"op": "time_copies", "device": device, **options}
        *_, done = self._run("timing copies", request, silence_limit_s=limit_s)
        return done
