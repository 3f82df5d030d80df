"""The ctypes projection of a placement: `llama_model_params` and `llama_context_params`.

The other projection, a llama-server command line, is `qnext.plan.flags`; both must mean the same placement.
Fields are set by name on the structs that `llama_*_default_params` return, because their layout changes
between releases.
"""

from __future__ import annotations

import ctypes
from typing import Any

from qnext.engine.llama.binding import EngineFailure, buffer_types, ggml, llama
from qnext.models.gguf_types import GGML_TYPES_BY_NAME
from qnext.plan.values import MODEL_FIELDS, Override, Placement

LOAD_MODES = {"none": 0, "mmap": 1, "mlock": 2, "mmap+mlock": 3, "dio": 4}
FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}


def model_part(placement: Placement) -> dict[str, Any]:
    """The fields of a placement that decide how a model is loaded; the others are its context's."""
    return {name: getattr(placement, name) for name in MODEL_FIELDS}


def placement_from_message(fields: dict[str, Any]) -> Placement:
    """A Placement from its JSON form (lists become tuples)."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    values["overrides"] = tuple(Override(**override) for override in fields["overrides"])
    return Placement(**values)


class _BufferOverride(ctypes.Structure):
    """`struct llama_model_tensor_buft_override` of llama.h."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


class ModelParams:
    """`llama_model_params` for a placement, with everything its pointers refer to kept alive beside it."""

    def __init__(self, placement: Placement, *, no_alloc: bool) -> None:
        lib = llama()
        self.struct: Any = lib.llama_model_default_params()
        self.struct.n_gpu_layers = placement.n_gpu_layers
        self.struct.load_mode = LOAD_MODES["none" if no_alloc else placement.load_mode]
        self.struct.use_extra_bufts = placement.extra_buffers
        self.struct.no_alloc = no_alloc
        self.struct.load_mtp = placement.load_mtp
        self.struct.check_tensors = False
        self._devices = self._device_array(placement)
        self.struct.devices = ctypes.cast(self._devices, ctypes.c_void_p)
        if placement.tensor_split is not None:
            count = lib.llama_max_devices()
            shares = list(placement.tensor_split) + [0.0] * (count - len(placement.tensor_split))
            self._split = (ctypes.c_float * count)(*shares)
            self.struct.tensor_split = self._split
        if placement.overrides:
            self._overrides = self._override_array(placement)
            self.struct.tensor_buft_overrides = ctypes.cast(self._overrides, ctypes.c_void_p)

    @staticmethod
    def _device_array(placement: Placement) -> Any:
        """NULL-terminated; empty means CPU only, where a NULL pointer would mean every device."""
        array = (ctypes.c_void_p * (len(placement.devices) + 1))()
        for index, name in enumerate(placement.devices):
            handle = ggml("ggml_backend_dev_by_name")(name.encode())
            if not handle:
                raise EngineFailure("device", f"the engine has no device named {name}")
            array[index] = handle
        return array

    @staticmethod
    def _override_array(placement: Placement) -> Any:
        known = buffer_types()
        array = (_BufferOverride * (len(placement.overrides) + 1))()
        for index, override in enumerate(placement.overrides):
            if override.buffer not in known:
                raise EngineFailure(
                    "device",
                    f"the engine has no buffer type '{override.buffer}'; it has {', '.join(sorted(known))}",
                )
            array[index].pattern = override.pattern.encode()
            array[index].buft = known[override.buffer]
        return array


def context_params(placement: Placement, *, context: int | None = None) -> Any:
    """`llama_context_params` for a placement; `context` replaces the placement's total token count."""
    struct = llama().llama_context_default_params()
    struct.n_ctx = context or placement.context
    struct.n_batch = placement.batch
    struct.n_ubatch = placement.ubatch
    struct.n_seq_max = placement.parallel
    struct.n_threads = placement.threads
    struct.n_threads_batch = placement.threads_batch
    struct.flash_attn_type = FLASH_ATTENTION[placement.flash_attention]
    struct.type_k = GGML_TYPES_BY_NAME[placement.kv_type_k.upper()].id
    struct.type_v = GGML_TYPES_BY_NAME[placement.kv_type_v.upper()].id
    struct.offload_kqv = placement.kv_offload
    struct.op_offload = placement.op_offload
    struct.kv_unified = placement.kv_unified
    struct.swa_full = placement.swa_full
    struct.n_rs_seq = placement.recurrent_rollback
    struct.n_outputs_max = placement.outputs_max
    struct.no_perf = True
    return struct
