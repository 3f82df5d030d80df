"""What the engine child can do: open a model, tokenise, generate, bench, dry-run, describe itself.

Every operation takes and returns plain JSON values. Nothing in here decides placement or prints.
"""

from __future__ import annotations

import ctypes
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from qnext.engine.llama import binding
from qnext.engine.llama.binding import EngineFailure
from qnext.engine.llama.link import time_copies
from qnext.engine.llama.memory import ContextMemory
from qnext.engine.llama.params import ModelParams, context_params, placement_from_message
from qnext.engine.llama.reserve import reserved_compute
from qnext.engine.llama.sampling import sampler_chain
from qnext.engine.llama.text import TextStream
from qnext.engine.llama.vocabulary import Vocabulary
from qnext.engine.protocol import Message
from qnext.plan.values import Placement

SIGN_OF_LIFE_S = 5.0
"""A long operation that has nothing to say says so about this often, or the parent would take it for hung.

One llama_decode cannot be interrupted for it; the parent waits longer for large batches."""

WARM_UP_TOKENS = 32

Stream = Callable[..., None]


class Cancelled(Exception):
    """The parent asked for the running operation to stop."""


class Runtime:
    """One model and one context at a time, and the operations on them."""

    def __init__(self, stream: Stream) -> None:
        self.cancel_requested = threading.Event()
        self._stream = stream
        self._abort_flag = ctypes.create_string_buffer(2)
        self._model: Any = None
        self._vocabulary: Vocabulary | None = None
        self._context: Any = None
        self._placement: Placement | None = None
        self._context_size: int | None = None
        self._memory: ContextMemory | None = None
        self._last_sign = 0.0
        self._backend_ready = False
        self._keep_alive: list[object] = []

    def handle(self, request: Message) -> dict[str, Any]:
        """Run one request; its `op` names the method. Raises Cancelled or EngineFailure."""
        self._last_sign = time.monotonic()
        operations: dict[str, Callable[..., dict[str, Any]]] = {
            "describe": self.describe,
            "open": self.open,
            "warm_up": self.warm_up,
            "dry_run": self.dry_run,
            "tokenize": self.tokenize,
            "generate": self.generate,
            "bench": self.bench,
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
        self._context_size = context
        self._make_context(context)
        lib, vocabulary = binding.llama(), self._open_vocabulary()
        return {
            "load_ns": time.perf_counter_ns() - started,
            "context": lib.llama_n_ctx(self._context),
            "context_per_sequence": lib.llama_n_ctx_seq(self._context),
            "batch": lib.llama_n_batch(self._context),
            "ubatch": lib.llama_n_ubatch(self._context),
            "vocabulary": vocabulary.size,
            "bos": vocabulary.text(vocabulary.bos),
            "eos": vocabulary.text(vocabulary.eos),
        }

    def warm_up(self) -> dict[str, Any]:
        """Decode a few tokens together, then one, and forget them: what first use costs or breaks is over.

        The tokens are all the same, so that they need few experts, and enough for the matrix kernels.
        """
        lib, memory = binding.llama(), self._ready_memory()
        assert self._placement is not None
        count = min(WARM_UP_TOKENS, self._placement.batch, lib.llama_n_ctx_seq(self._context) - 1)
        token = max(0, self._open_vocabulary().bos)
        self._decode([token] * count)
        self._decode([token])
        lib.llama_synchronize(self._context)
        memory.clear()
        return {}

    def dry_run(self, model: str, placement: dict[str, Any]) -> dict[str, Any]:
        """Metadata-only load and simulated allocation: the log then holds KV, state and compute sizes.

        `compute` of the result are the compute buffers as a real load reserves them (buffer type, bytes),
        None where only the log tells.
        """
        self._load(model, placement_from_message(placement), no_alloc=True)
        self._make_context(None)
        assert self._placement is not None
        compute = reserved_compute(self._context, self._placement.outputs_max)
        self.close()
        return {"compute": compute}

    def close(self) -> dict[str, Any]:
        """Free context and model."""
        lib = binding.llama()
        self._free_context()
        if self._model is not None:
            lib.llama_model_free(self._model)
        self._model = self._vocabulary = None
        return {}

    def _load(self, model: str, placement: Placement, *, no_alloc: bool) -> None:
        self.close()
        lib = self._start_backend(placement.rpc_servers)
        parameters = ModelParams(placement, no_alloc=no_alloc)
        report = lib.llama_progress_callback(self._report_progress)
        parameters.struct.progress_callback = report
        self._keep_alive = [parameters, report]
        self._model = lib.llama_model_load_from_file(os.fsencode(model), parameters.struct)
        if not self._model:
            self._model = None
            if self.cancel_requested.is_set():
                raise Cancelled
            raise EngineFailure("load", "llama.cpp could not load the model")
        self._vocabulary = Vocabulary(self._model)
        self._placement = placement

    def _report_progress(self, share: float, _user_data: object) -> bool:
        self._stream("progress", share=share)
        return not self.cancel_requested.is_set()

    def _free_context(self) -> None:
        if self._context is not None:
            binding.llama().llama_free(self._context)
        self._context = self._memory = None

    def _make_context(self, context: int | None) -> None:
        lib = binding.llama()
        assert self._placement is not None
        self._free_context()
        parameters = context_params(self._placement, context=context)
        self._context = lib.llama_init_from_model(self._model, parameters) or None
        if self._context is None:
            raise EngineFailure("context", "llama.cpp could not allocate the context")
        self._memory = ContextMemory(self._model, self._context, swa_full=self._placement.swa_full)
        # libc's strlen over a one-byte flag is the abort callback: llama.cpp asks once per graph node, and
        # strlen answers "is the flag set?" without entering Python and waiting for its lock.
        strlen = ctypes.cast(_libc().strlen, lib.ggml_abort_callback)
        lib.llama_set_abort_callback(self._context, strlen, ctypes.cast(self._abort_flag, ctypes.c_void_p))

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
        vocabulary, memory = self._open_vocabulary(), self._ready_memory()
        tokens = vocabulary.tokenize(text, special=True, add_bos=vocabulary.adds_bos_to(text))
        limit = lib.llama_n_ctx_seq(self._context)
        if not tokens:
            raise EngineFailure("empty", "the prompt is empty")
        if len(tokens) > limit:
            raise EngineFailure(
                "context_full", f"the conversation is {len(tokens)} tokens long, the context {limit}"
            )
        started = time.perf_counter_ns()
        cached = memory.keep_common(tokens)
        self._prefill(tokens, cached)
        prefill_ns = time.perf_counter_ns() - started
        chain = sampler_chain(sampling)
        shown = TextStream(stop or ())
        generated, reason = 0, "length"
        room = min(max_tokens, limit - len(tokens) + 1)  # the last token is sampled, not evaluated
        started = last = time.perf_counter_ns()
        try:
            while generated < room:
                token = lib.llama_sampler_sample(chain, self._context, -1)
                generated += 1
                if vocabulary.ends_generation(token) and not ignore_eos:
                    reason = "eos"
                    break
                self._stream("token", text=shown.feed(vocabulary.piece(token)), id=token)
                if shown.stopped:
                    reason = "stop"
                    break
                if generated == room:
                    reason = "length" if room == max_tokens else "context"
                    break
                self._decode([token])
                lib.llama_synchronize(self._context)
                last = time.perf_counter_ns()
        finally:
            lib.llama_sampler_free(chain)
        if not shown.stopped and (rest := shown.feed(b"", final=True)):
            self._stream("token", text=rest, id=None)
        return {
            "prompt_tokens": len(tokens),
            "cached_tokens": cached,
            "generated": generated,
            "prefill_ns": prefill_ns,
            "decode_ns": last - started,
            "decodes": len(memory.tokens) - len(tokens),
            "stop_reason": reason,
        }

    def _open_vocabulary(self) -> Vocabulary:
        """The open model's vocabulary. Raises EngineFailure when no model is open."""
        if self._vocabulary is None:
            raise EngineFailure("not_open", "no model is open")
        return self._vocabulary

    def _ready_memory(self) -> ContextMemory:
        """The context's memory; a benchmark before this has freed the context, so make it again."""
        self._open_vocabulary()
        if self._memory is None:
            self._make_context(self._context_size)
        assert self._memory is not None
        return self._memory

    def _prefill(self, tokens: list[int], start: int) -> None:
        """Evaluate `tokens` from `start` on, a ubatch at a time so that its progress can be told."""
        assert self._placement is not None and self._memory is not None
        pause = self._memory.checkpoint_position(len(tokens))
        step = min(self._placement.ubatch, self._placement.batch)
        position = start
        while position < len(tokens):
            end = min(position + step, len(tokens))
            if pause is not None and position < pause < end:
                end = pause
            self._decode(tokens[position:end])
            binding.llama().llama_synchronize(self._context)
            if end == pause:
                self._memory.save()
            position = end
            self._stream("prefill", done=position - start, total=len(tokens) - start)

    def _decode(self, tokens: list[int]) -> None:
        lib = binding.llama()
        assert self._memory is not None
        if self.cancel_requested.is_set():
            raise Cancelled
        array = (lib.llama_token * len(tokens))(*tokens)
        status = lib.llama_decode(self._context, lib.llama_batch_get_one(array, len(tokens)))
        if status == 0:
            self._memory.tokens.extend(tokens)
        else:
            self._memory.mark_torn()
        if status == _ABORTED or self.cancel_requested.is_set():
            raise Cancelled
        if status == _NO_ROOM:
            raise EngineFailure("context_full", "no room left in the context")
        if status != 0:
            raise EngineFailure("decode", f"llama_decode failed with status {status}")
        if time.monotonic() - self._last_sign > SIGN_OF_LIFE_S:
            self._last_sign = time.monotonic()
            self._stream("alive")

    def abort(self) -> None:
        """Make a running decode return at the next graph node (called from the reading thread)."""
        self._abort_flag[0] = b"\1"
        self.cancel_requested.set()

    def arm(self) -> None:
        """Forget an earlier abort: a new request has come."""
        self.cancel_requested.clear()
        self._abort_flag[0] = b"\0"

    def bench(
        self, prompt: int, generate: int, depth: int, repetitions: int, warmup: bool = True, seed: int = 1
    ) -> dict[str, Any]:
        """llama-bench's test: a fresh context, one uncounted warm-up, then `repetitions` timed runs.

        Prompt tokens are random and go in `batch`-sized pieces; generation feeds one random token at a time
        and synchronises after each. `depth` tokens are evaluated first, their state kept and restored for
        the later runs. Streams a `sample` event (ns) as each run ends.
        """
        vocabulary = self._open_vocabulary().size
        assert self._placement is not None
        lib = binding.llama()
        self._make_context(prompt + generate + depth)
        placement = self._placement
        pool = binding.new_threadpool(placement.threads)
        binding.ggml("llama_attach_threadpool")(self._context, pool, None)
        tokens = _random_tokens(vocabulary, random.Random(seed))
        memory = self._ready_memory()
        saved: Any = None
        samples: list[int] = []
        try:
            if warmup:
                self._bench_prompt(tokens, prompt)
                self._bench_generate(tokens, min(generate, 1))
            for _ in range(repetitions):
                memory.clear()
                if depth and saved is None:
                    self._bench_prompt(tokens, depth)
                    saved = ctypes.create_string_buffer(lib.llama_state_seq_get_size(self._context, 0))
                    lib.llama_state_seq_get_data(self._context, _bytes_pointer(saved), len(saved), 0)
                elif depth:
                    lib.llama_state_seq_set_data(self._context, _bytes_pointer(saved), len(saved), 0)
                started = time.perf_counter_ns()
                self._bench_prompt(tokens, prompt)
                self._bench_generate(tokens, generate)
                samples.append(time.perf_counter_ns() - started)
                self._stream("sample", ns=samples[-1])
        finally:
            self._free_context()
            binding.free_threadpool(pool)
        return {"samples_ns": samples}

    def _bench_prompt(self, tokens: Iterator[int], count: int) -> None:
        assert self._placement is not None
        done = 0
        while done < count:
            step = min(count - done, self._placement.batch)
            self._decode([next(tokens) for _ in range(step)])
            done += step
        binding.llama().llama_synchronize(self._context)

    def _bench_generate(self, tokens: Iterator[int], count: int) -> None:
        for _ in range(count):
            self._decode([next(tokens)])
            binding.llama().llama_synchronize(self._context)


_ABORTED, _NO_ROOM = 2, 1
"""What llama_decode returns besides 0 and errors below 0."""


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None if os.name == "posix" else "msvcrt")


def _random_tokens(vocabulary: int, source: random.Random) -> Iterator[int]:
    while True:
        yield source.randrange(vocabulary)


def _bytes_pointer(buffer: Any) -> Any:
    return ctypes.cast(buffer, ctypes.POINTER(ctypes.c_uint8))
