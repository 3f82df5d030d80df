"""One llama_batch that is filled anew for every step: tokens of several sequences, evaluated in one call.

The arrays behind it are numpy's, so that a chunk of a prompt is copied in one piece and a step allocates
nothing. Every token belongs to one sequence; `seq_id` points into a table with one entry per sequence.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnext.engine.llama.binding import llama

Tokens = NDArray[np.int32]
"""Token ids, as llama.cpp counts them: 32 bit."""


class Batch:
    """Room for `capacity` tokens of `sequences` sequences."""

    def __init__(self, capacity: int, sequences: int) -> None:
        self._tokens = np.zeros(capacity, np.int32)
        self._positions = np.zeros(capacity, np.int32)
        self._counts = np.ones(capacity, np.int32)
        self._sequences = np.arange(sequences, dtype=np.int32)
        self._sequence_pointers = np.zeros(capacity, np.uint64)
        self._outputs = np.zeros(capacity, np.int8)
        self._ramp = np.arange(capacity, dtype=np.int32)
        lib = llama()
        self._struct: Any = lib.llama_batch()
        self._struct.token = self._tokens.ctypes.data_as(ctypes.POINTER(lib.llama_token))
        self._struct.pos = self._positions.ctypes.data_as(ctypes.POINTER(lib.llama_pos))
        self._struct.n_seq_id = self._counts.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        self._struct.seq_id = ctypes.cast(
            self._sequence_pointers.ctypes.data, ctypes.POINTER(ctypes.POINTER(lib.llama_seq_id))
        )
        self._struct.logits = self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        self._address = [int(self._sequences.ctypes.data) + 4 * index for index in range(sequences)]
        self.size = 0

    def clear(self) -> None:
        """Begin a step."""
        self.size = 0

    def add(self, sequence: int, token: int, position: int) -> None:
        """One token whose logits are wanted."""
        index = self.size
        self._tokens[index] = token
        self._positions[index] = position
        self._sequence_pointers[index] = self._address[sequence]
        self._outputs[index] = 1
        self.size = index + 1

    def extend(self, sequence: int, tokens: Tokens, position: int, *, output: bool) -> None:
        """Tokens of one sequence from `position` on; with `output`, the last one's logits are wanted."""
        start, end = self.size, self.size + len(tokens)
        self._tokens[start:end] = tokens
        np.add(self._ramp[: len(tokens)], position, out=self._positions[start:end])
        self._sequence_pointers[start:end] = self._address[sequence]
        self._outputs[start:end] = 0
        if output:
            self._outputs[end - 1] = 1
        self.size = end

    def decode(self, context: Any) -> int:
        """Evaluate it; llama_decode's status."""
        self._struct.n_tokens = self.size
        status: int = llama().llama_decode(context, self._struct)
        return status
