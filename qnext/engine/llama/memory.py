"""What a context remembers, and how to go back to an earlier point of it.

Attention caches can be cut at any token. The recurrent state of a hybrid model and a sliding-window cache
cannot: they know only the present. A conversation has to go back all the same, to the end of its last prompt:
templates drop the thinking of earlier turns, an answer is interrupted or asked for again. So the part that
cannot be cut is copied to host memory (75 MiB for Qwen3-Next-80B) just before a prompt ends, and the last two
copies are kept: for an answer that is given again, and for a question that is taken back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from qnext.engine.llama.binding import llama

CHECKPOINT_TAIL = 4
"""Tokens between the copy and the end of the prompt: a template's `assistant\\n<think>\\n` may change."""

CHECKPOINT_FROM = 256
"""Shorter prompts are evaluated again sooner than copied."""

COPIES_KEPT = 2

_SEQUENCE = 0
_UNKNOWN = -1


class ContextMemory:
    """The tokens that sequence 0 of `context` holds. `tokens` is kept up to date by who decodes."""

    def __init__(self, model: Any, context: Any, *, swa_full: bool) -> None:
        lib = llama()
        self._context = context
        self._memory = lib.llama_get_memory(context)
        self._uncuttable = bool(
            lib.llama_model_is_hybrid(model)
            or lib.llama_model_is_recurrent(model)
            or (lib.llama_model_n_swa(model) > 0 and not swa_full)
        )
        self._copies: list[tuple[int, Any]] = []
        self.tokens: list[int] = []

    def clear(self) -> None:
        """Forget everything."""
        llama().llama_memory_clear(self._memory, False)
        self.tokens = []
        self._copies = []

    @property
    def evaluated(self) -> int:
        """Tokens that were evaluated to their end."""
        return len(self.tokens) - self.tokens.count(_UNKNOWN)

    def copy_all(self) -> Any:
        """A copy of everything that is held, in host memory; None if there is no room for it."""
        lib = llama()
        size = lib.llama_state_seq_get_size(self._context, _SEQUENCE)
        try:
            copy = ctypes.create_string_buffer(size)
        except MemoryError:
            return None
        return copy if lib.llama_state_seq_get_data(self._context, _pointer(copy), size, _SEQUENCE) else None

    def put_back(self, copy: Any, tokens: Sequence[int]) -> bool:
        """Hold again what was copied when `tokens` were held; False, and nothing is held, if it does not fit.

        The logits are not part of it: nothing can be sampled before another decode.
        """
        self.clear()
        if not llama().llama_state_seq_set_data(self._context, _pointer(copy), len(copy), _SEQUENCE):
            self.clear()
            return False
        self.tokens = list(tokens)
        return True

    def mark_torn(self) -> None:
        """After a decode that did not finish: what comes after `tokens` is in an unknown state."""
        self.tokens.append(_UNKNOWN)

    def checkpoint_position(self, prompt_tokens: int) -> int | None:
        """Where a prompt of that length should pause for `save`; None if it need not."""
        position = prompt_tokens - CHECKPOINT_TAIL
        return position if self._uncuttable and position >= CHECKPOINT_FROM else None

    def save(self) -> None:
        """Copy the part that cannot be cut, as it is now."""
        lib, flags = llama(), llama().LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        size = lib.llama_state_seq_get_size_ext(self._context, _SEQUENCE, flags)
        copy = ctypes.create_string_buffer(size)
        if lib.llama_state_seq_get_data_ext(self._context, _pointer(copy), size, _SEQUENCE, flags):
            self._copies = [*self._copies, (len(self.tokens), copy)][-COPIES_KEPT:]

    def keep_common(self, tokens: list[int]) -> int:
        """Go back to what is shared with `tokens` and can be reached; returns its length.

        At least one token is left to evaluate: sampling needs its logits.
        """
        common = 0
        for old, new in zip(self.tokens, tokens, strict=False):
            if old != new:
                break
            common += 1
        common = min(common, len(tokens) - 1)
        if common < len(self.tokens):
            common = self._go_back(common)
        return common

    def _go_back(self, count: int) -> int:
        """Cut back to `count` tokens, or to the latest copy before that, or to nothing."""
        self._copies = [copy for copy in self._copies if copy[0] <= count]
        if self._uncuttable:
            count = self._restore()
        if count == 0 or not llama().llama_memory_seq_rm(self._memory, _SEQUENCE, count, -1):
            self.clear()
            return 0
        self.tokens = self.tokens[:count]
        return count

    def _restore(self) -> int:
        if not self._copies:
            return 0
        lib = llama()
        count, copy = self._copies[-1]
        read = lib.llama_state_seq_set_data_ext(
            self._context, _pointer(copy), len(copy), _SEQUENCE, lib.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        )
        return count if read else 0


def _pointer(buffer: Any) -> Any:
    return ctypes.cast(buffer, ctypes.POINTER(ctypes.c_uint8))
