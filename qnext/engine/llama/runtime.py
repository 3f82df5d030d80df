"""What the engine child can do: open a model, renew its context, tokenise, generate, time, dry-run, describe.

Every operation takes and returns plain JSON values. Nothing in here decides placement or prints.
"""

from __future__ import annotations

import ctypes
import os
import queue
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from qnext.engine.llama import binding, timing
from qnext.engine.llama.binding import EngineFailure
from qnext.engine.llama.context import Context
from qnext.engine.llama.link import time_copies
from qnext.engine.llama.params import ModelParams, model_part, placement_from_message
from qnext.engine.llama.reserve import reserved_compute
from qnext.engine.llama.sampling import sampler_chain
from qnext.engine.llama.signals import Cancelled, Signals, Stream
from qnext.engine.llama.text import TextStream
from qnext.engine.llama.vocabulary import Vocabulary
from qnext.engine.protocol import Message
from qnext.plan.values import Placement

WARM_UP_TOKENS = 32


class Runtime:
    """One model and one context at a time, and the operations on them."""

    def __init__(self, stream: Stream, inbox: queue.Queue[Message] | None = None) -> None:
        self.signals = Signals(stream)
        self._inbox = inbox
        self._model: Any = None
        self._path: str | None = None
        self._vocabulary: Vocabulary | None = None
        self._context: Context | None = None
        self._placement: Placement | None = None
        self._context_size: int | None = None
        self._depths = timing.DepthStates()
        self._backend_ready = False
        self._keep_alive: list[object] = []

    def handle(self, request: Message) -> dict[str, Any]:
        """Run one request; its `op` names the method. Raises Cancelled or EngineFailure."""
        self.signals.begin()
        operations: dict[str, Callable[..., dict[str, Any]]] = {
            "describe": self.describe,
            "open": self.open,
            "renew": self.renew,
            "warm_up": self.warm_up,
            "dry_run": self.dry_run,
            "tokenize": self.tokenize,
            "generate": self.generate,
            "bench": self.bench,
            "turn": self.turn,
            "serve": self.serve,
            "time_copies": self.time_copies,
            "close": self.close,
        }
        arguments = {name: value for name, value in request.items() if name != "op"}
        return operations[str(request["op"])](**arguments)

    def _start_backend(self, rpc_servers: tuple[str, ...] = ()) -> Any:
        lib = binding.llama()
        if not self._backend_ready:
            lib.llama_backend_init()
            # NULL restores llama.cpp's own logger, which writes to standard error: no Python in its path.
            lib.llama_log_set(lib.llama_log_callback(0), ctypes.c_void_p(0))
            self._backend_ready = True
        binding.add_rpc_servers(rpc_servers)
        return lib

    def describe(self, rpc_servers: list[str] | None = None) -> dict[str, Any]:
        """Devices, buffer types, build features and whether RPC is compiled in."""
        lib = self._start_backend(tuple(rpc_servers or ()))
        devices = [asdict(device) for device in binding.list_devices()]
        for device in devices:
            del device["handle"]
        return {
            "devices": devices,
            "buffer_types": sorted(binding.buffer_types()),
            "system_info": lib.llama_print_system_info().decode(),
            "rpc": bool(lib.llama_supports_rpc()),
            "gpu_offload": bool(lib.llama_supports_gpu_offload()),
            "llama_version": lib.llama_version().decode(),
        }

    def time_copies(self, device: str, rpc_servers: list[str], **options: Any) -> dict[str, Any]:
        """Time copies between the host and a device; see `qnext.engine.llama.link`."""
        self._start_backend(tuple(rpc_servers))
        return time_copies(device, **options)

    def open(self, model: str, placement: dict[str, Any], context: int | None = None) -> dict[str, Any]:
        """Load `model` and make a context. Streams `progress` events with a share from 0 to 1."""
        started = time.perf_counter_ns()
        self._load(model, placement_from_message(placement), no_alloc=False)
        assert self._placement is not None
        self._make_context(self._placement, context)
        return {"load_ns": time.perf_counter_ns() - started, **self._facts()}

    def renew(self, placement: dict[str, Any], context: int | None = None) -> dict[str, Any]:
        """Make a new context on the open model, from the context part of `placement`.

        The old context goes first, since both may not fit. If the new one cannot be made, the model stays
        open; what needs a context gets one as it was before.
        """
        self._open_vocabulary()
        wanted, loaded = placement_from_message(placement), self._placement
        assert loaded is not None
        have, want = model_part(loaded), model_part(wanted)
        if differing := sorted(name for name in have if have[name] != want[name]):
            raise EngineFailure("model_part", f"the model is loaded with another {', '.join(differing)}")
        self._make_context(wanted, context)
        return self._facts()

    def _facts(self) -> dict[str, Any]:
        """What is open, and which sizes are active."""
        lib, vocabulary, context = binding.llama(), self._open_vocabulary(), self._ready_context()
        text = ctypes.create_string_buffer(256)
        lib.llama_model_desc(self._model, text, len(text))
        return {
            **context.active(),
            "vocabulary": vocabulary.size,
            "bos": vocabulary.text(vocabulary.bos),
            "eos": vocabulary.text(vocabulary.eos),
            "model_desc": text.value.decode(errors="replace"),
            "system_info": lib.llama_print_system_info().decode(),
        }

    def warm_up(self) -> dict[str, Any]:
        """Decode a few tokens together, then one, and forget them: what first use costs or breaks is over.

        The tokens are all the same, so that they need few experts, and enough for the matrix kernels.
        """
        context = self._ready_context()
        count = min(WARM_UP_TOKENS, context.placement.batch, context.limit - 1)
        token = max(0, self._open_vocabulary().bos)
        context.decode([token] * count)
        context.decode([token])
        context.synchronize()
        context.memory.clear()
        return {}

    def dry_run(self, model: str, placement: dict[str, Any]) -> dict[str, Any]:
        """Metadata-only load and simulated allocation: the log then holds KV, state and compute sizes.

        `compute` of the result are the compute buffers as a real load reserves them (buffer type, bytes),
        None where only the log tells.
        """
        self._load(model, placement_from_message(placement), no_alloc=True)
        assert self._placement is not None
        context = self._make_context(self._placement, None)
        compute = reserved_compute(context.handle, self._placement.outputs_max)
        self.close()
        return {"compute": compute}

    def close(self) -> dict[str, Any]:
        """Free context and model."""
        self._free_context()
        if self._model is not None:
            binding.llama().llama_model_free(self._model)
        self._model = self._vocabulary = None
        return {}

    def _load(self, model: str, placement: Placement, *, no_alloc: bool) -> None:
        self.close()
        if model != self._path:
            self._depths.clear()
        lib = self._start_backend(placement.rpc_servers)
        parameters = ModelParams(placement, no_alloc=no_alloc)
        report = lib.llama_progress_callback(self._report_progress)
        parameters.struct.progress_callback = report
        self._keep_alive = [parameters, report]
        self._model = lib.llama_model_load_from_file(os.fsencode(model), parameters.struct)
        if not self._model:
            self._model = None
            if self.signals.cancel_requested.is_set():
                raise Cancelled
            raise EngineFailure("load", "llama.cpp could not load the model")
        self._vocabulary = Vocabulary(self._model)
        self._path, self._placement, self._context_size = model, placement, None

    def _report_progress(self, share: float, _user_data: object) -> bool:
        self.signals.stream("progress", share=share)
        return not self.signals.cancel_requested.is_set()

    def _free_context(self) -> None:
        if self._context is not None:
            self._context.free()
        self._context = None

    def _make_context(self, placement: Placement, size: int | None) -> Context:
        """Replace the context; only one that could be made is what later requests get again."""
        self._free_context()
        self._context = Context(self._model, placement, self.signals, size=size)
        self._placement, self._context_size = placement, size
        return self._context

    def tokenize(self, text: str, special: bool = True, add_bos: bool = False) -> dict[str, Any]:
        """Token ids of `text`; with `special`, control tokens written out in it count as such."""
        return {"tokens": self._open_vocabulary().tokenize(text, special=special, add_bos=add_bos)}

    def generate(
        self,
        text: str,
        max_tokens: int,
        sampling: dict[str, float],
        ignore_eos: bool = False,
        stop: list[str] | None = None,
    ) -> dict[str, Any]:
        """Continue `text`. Streams `prefill` (done, total) and `token` (text) events; see keys of the result.

        `cached_tokens` were in the context from the turn before and cost nothing; `prefill_ns` is the time to
        evaluate the other prompt tokens, `decode_ns` the time for `generated - 1` further decodes: the first
        token comes out of the prefill. `stop_reason` is eos, length, context or stop.
        """
        lib = binding.llama()
        vocabulary, context = self._open_vocabulary(), self._ready_context()
        tokens = vocabulary.tokenize(text, special=True, add_bos=vocabulary.adds_bos_to(text))
        limit = context.limit
        if not tokens:
            raise EngineFailure("empty", "the prompt is empty")
        if len(tokens) > limit:
            raise EngineFailure(
                "context_full", f"the conversation is {len(tokens)} tokens long, the context {limit}"
            )
        started = time.perf_counter_ns()
        cached = context.memory.keep_common(tokens)
        self._prefill(context, tokens, cached)
        prefill_ns = time.perf_counter_ns() - started
        chain = sampler_chain(sampling)
        shown = TextStream(stop or ())
        generated, reason = 0, "length"
        room = min(max_tokens, limit - len(tokens) + 1)  # the last token is sampled, not evaluated
        started = last = time.perf_counter_ns()
        try:
            while generated < room:
                token = lib.llama_sampler_sample(chain, context.handle, -1)
                generated += 1
                if vocabulary.ends_generation(token) and not ignore_eos:
                    reason = "eos"
                    break
                self.signals.stream("token", text=shown.feed(vocabulary.piece(token)), id=token)
                if shown.stopped:
                    reason = "stop"
                    break
                if generated == room:
                    reason = "length" if room == max_tokens else "context"
                    break
                context.decode([token])
                context.synchronize()
                last = time.perf_counter_ns()
        finally:
            lib.llama_sampler_free(chain)
        if not shown.stopped and (rest := shown.feed(b"", final=True)):
            self.signals.stream("token", text=rest, id=None)
        return {
            "prompt_tokens": len(tokens),
            "cached_tokens": cached,
            "generated": generated,
            "prefill_ns": prefill_ns,
            "decode_ns": last - started,
            "decodes": len(context.memory.tokens) - len(tokens),
            "stop_reason": reason,
        }

    def _open_vocabulary(self) -> Vocabulary:
        """The open model's vocabulary. Raises EngineFailure when no model is open."""
        if self._vocabulary is None:
            raise EngineFailure("not_open", "no model is open")
        return self._vocabulary

    def _ready_context(self) -> Context:
        """The context; after a benchmark has used one of its own, or a new one failed, as it was before."""
        self._open_vocabulary()
        if self._context is None:
            assert self._placement is not None
            return self._make_context(self._placement, self._context_size)
        return self._context

    def _prefill(self, context: Context, tokens: list[int], start: int) -> None:
        """Evaluate `tokens` from `start` on, a ubatch at a time so that its progress can be told."""
        pause = context.memory.checkpoint_position(len(tokens))
        step = min(context.placement.ubatch, context.placement.batch)
        position = start
        while position < len(tokens):
            end = min(position + step, len(tokens))
            if pause is not None and position < pause < end:
                end = pause
            context.decode(tokens[position:end])
            context.synchronize()
            if end == pause:
                context.memory.save()
            position = end
            self.signals.stream("prefill", done=position - start, total=len(tokens) - start)

    def bench(self, prompt: int, generate: int, depth: int, **options: Any) -> dict[str, Any]:
        """llama-bench's test on a context of its own; see `qnext.engine.llama.timing.bench`."""
        vocabulary = self._open_vocabulary().size
        assert self._placement is not None
        self._free_context()
        placement, size = self._placement, prompt + generate + depth
        context = Context(self._model, placement, self.signals, size=size)
        try:
            return timing.bench(
                context, self.signals, vocabulary, prompt=prompt, generate=generate, depth=depth, **options
            )
        finally:
            context.free()

    def turn(self, **options: Any) -> dict[str, Any]:
        """One timed turn on the present context; see `qnext.engine.llama.timing.turn`."""
        return timing.turn(self._ready_context(), self.signals, self._depths, **options)

    def serve(self, **options: Any) -> dict[str, Any]:
        """Serve many texts at once until told to stop; see `qnext.engine.llama.serving`."""
        from qnext.engine.llama.serving import Serving  # numpy, which nothing else in here needs

        assert self._inbox is not None
        vocabulary, context = self._open_vocabulary(), self._ready_context()
        return Serving(context, vocabulary, self.signals, self._inbox, model=self._model, **options).run()
