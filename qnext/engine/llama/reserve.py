"""The compute buffers that a real load would reserve, told by a context that allocates nothing.

llama.cpp's own simulation, a model loaded with `no_alloc`, forgets what its graph builder said: between
building the graph and cutting it into pieces for the devices, `ggml_backend_sched_reserve_size` resets the
scheduler, and with it the devices that were named for some operations (`llama_context::graph_get_cb`: the
norms and the last sum of each layer; `build_attn_mha`: attention beside a cache in host memory). Where the
layers of two devices meet, the graph is then cut elsewhere than in a real load. The norm after the border
runs before it and crosses, too: n_embd × ubatch × 4 bytes too many, four times that where devices work in a
pipeline (all of them asynchronous and with events, as CUDA and RPC are, all layers on them, no tensor
overrides). Or a sum over experts in host memory runs on the wrong device: that much is missing on the other.

A real load's reservation (`llama_graph_reserve` of llama-ext.h) keeps the names, but allocates. So it runs
here with buffer types whose allocation only notes the size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qnext.engine.llama.binding import BufferInterface, buffer_type_name, ggml, llama

_ALLOC_BUFFER = 1
"""Place of `alloc_buffer` among the pointers of `struct ggml_backend_buffer_type_i` (ggml-backend-impl.h)."""

_POINTER = ctypes.sizeof(ctypes.c_void_p)

_AllocBuffer = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def reserved_compute(context: Any, outputs_max: int) -> list[tuple[str, int]] | None:
    """Buffer type and bytes of each compute buffer of a context made from a `no_alloc` model.

    `outputs_max` is the context's parameter. None where this build of llama.cpp does not export the two
    functions this needs, or lays out its buffer types in another way.
    """
    try:
        reserve = _exported("_Z19llama_graph_reserveP13llama_contextjjj", [ctypes.c_uint32] * 3)
        scheduler = _exported("_ZNK13llama_context9get_schedEv", [])(context)
    except AttributeError:
        return None
    backends = [
        ggml("ggml_backend_sched_get_backend")(scheduler, index)
        for index in range(ggml("ggml_backend_sched_get_n_backends")(scheduler))
    ]
    buffer_types = [ggml("ggml_backend_sched_get_buffer_type")(scheduler, backend) for backend in backends]
    lib = llama()
    sequences = lib.llama_n_seq_max(context)
    tokens = min(lib.llama_n_ctx(context), lib.llama_n_ubatch(context))
    outputs = min(tokens, outputs_max or lib.llama_n_batch(context))
    with _pretending(set(buffer_types)) as pretends:
        # The order of llama_context::sched_reserve: a prompt, one token of each sequence, the prompt again.
        if not pretends or not all(
            reserve(context, *sizes)
            for sizes in ((tokens, sequences, outputs), (sequences,) * 3, (tokens, sequences, outputs))
        ):
            return None
        sizes = [ggml("ggml_backend_sched_get_buffer_size")(scheduler, backend) for backend in backends]
    return [(buffer_type_name(one), size) for one, size in zip(buffer_types, sizes, strict=True) if size]


def _exported(symbol: str, arguments: list[Any]) -> Any:
    """A C++ function of libllama that takes a context first. Raises AttributeError where it is missing."""
    function = llama()._lib[symbol]
    function.restype = ctypes.c_void_p
    function.argtypes = [ctypes.c_void_p, *arguments]
    return function


@contextmanager
def _pretending(buffer_types: set[int]) -> Iterator[bool]:
    """Make these buffer types allocate empty buffers that state the size asked for.

    Yields whether they do. The buffers may outlive this: they have nothing to free.
    """
    calls: list[int] = []

    def allocate(buffer_type: int, size: int) -> int:
        calls.append(size)
        buffer: int = ggml("ggml_backend_buffer_init")(buffer_type, BufferInterface(), None, size)
        return buffer

    callback = _AllocBuffer(allocate)
    slots = [ctypes.c_void_p.from_address(one + _ALLOC_BUFFER * _POINTER) for one in buffer_types]
    before = [slot.value for slot in slots]
    try:
        for slot in slots:
            slot.value = ctypes.cast(callback, ctypes.c_void_p).value
        for one in buffer_types:
            ggml("ggml_backend_buffer_free")(ggml("ggml_backend_buft_alloc_buffer")(one, 1))
        yield calls == [1] * len(slots)
    finally:
        for slot, value in zip(slots, before, strict=True):
            slot.value = value
