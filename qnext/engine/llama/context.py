"""One llama_context: evaluating tokens in it, and what of a placement is active in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qnext.engine.llama import binding
from qnext.engine.llama.binding import EngineFailure
from qnext.engine.llama.memory import ContextMemory
from qnext.engine.llama.params import context_params
from qnext.engine.llama.signals import Signals
from qnext.plan.values import Placement

_NO_ROOM = 1
"""What llama_decode returns besides 0, 2 (stopped by our signals) and errors below 0."""


class Context:
    """A context on an open `model`, made from the context part of `placement`; `size` replaces its tokens.

    `handle` is the llama_context. Free it before the model. Raises EngineFailure (`context`).
    """

    def __init__(self, model: Any, placement: Placement, signals: Signals, *, size: int | None) -> None:
        lib = binding.llama()
        self.placement = placement
        self._signals = signals
        self._threadpool: int | None = None
        self.handle: Any = lib.llama_init_from_model(model, context_params(placement, context=size)) or None
        if self.handle is None:
            raise EngineFailure("context", "llama.cpp could not allocate the context")
        self.memory = ContextMemory(model, self.handle, swa_full=placement.swa_full)
        signals.watch(self.handle)
        self.limit: int = lib.llama_n_ctx_seq(self.handle)
        """Tokens that one sequence may hold."""

    def active(self) -> dict[str, int]:
        """What llama.cpp made of the sizes asked for: it pads contexts and cuts batches."""
        lib = binding.llama()
        return {
            "context": lib.llama_n_ctx(self.handle),
            "context_per_sequence": self.limit,
            "batch": lib.llama_n_batch(self.handle),
            "ubatch": lib.llama_n_ubatch(self.handle),
            "threads": lib.llama_n_threads(self.handle),
            "threads_batch": lib.llama_n_threads_batch(self.handle),
        }

    def use_own_threads(self) -> None:
        """Give the context a pool of threads that stay, as llama-bench does."""
        self._threadpool = binding.new_threadpool(self.placement.threads)
        binding.ggml("llama_attach_threadpool")(self.handle, self._threadpool, None)

    def decode(self, tokens: Sequence[int]) -> None:
        """Evaluate `tokens` after those that are held. Raises Cancelled, OutOfTime or EngineFailure."""
        lib = binding.llama()
        self._signals.check()
        array = (lib.llama_token * len(tokens))(*tokens)
        status = lib.llama_decode(self.handle, lib.llama_batch_get_one(array, len(tokens)))
        if status != 0:
            self.memory.mark_torn()
            self._signals.check()
            if status == _NO_ROOM:
                raise EngineFailure("context_full", "no room left in the context")
            raise EngineFailure("decode", f"llama_decode failed with status {status}")
        self.memory.tokens.extend(tokens)
        self._signals.sign_of_life()

    def decode_in_batches(self, tokens: Sequence[int]) -> None:
        """Evaluate `tokens` a batch at a time, and wait for the end of the last one."""
        step = self.placement.batch
        for start in range(0, len(tokens), step):
            self.decode(tokens[start : start + step])
        self.synchronize()

    def synchronize(self) -> None:
        """Wait until everything decoded has been computed."""
        binding.llama().llama_synchronize(self.handle)

    def free(self) -> None:
        """Give the memory back."""
        binding.llama().llama_free(self.handle)
        self.handle = None
        if self._threadpool is not None:
            binding.free_threadpool(self._threadpool)
            self._threadpool = None
