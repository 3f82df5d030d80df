"""The values a plan is made of. All sizes are integer bytes; all of them are frozen.

A `Placement` is the single description of where everything goes and how the engine is started. It has two
projections, ctypes parameters (`qnext.engine.llama.params`) and a llama-server command line
(`qnext.plan.flags`), and both must mean the same thing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

HOST = "CPU"
"""Name of the host memory pool and of llama.cpp's plain CPU buffer type."""

CPU_REPACK = "CPU_REPACK"
"""llama.cpp's extra CPU buffer type that stores quantised weights interleaved for wider SIMD kernels."""

OFFLOAD_MIN_TOKENS = 32
"""llama.cpp's GGML_OP_OFFLOAD_MIN_BATCH: smaller ubatches leave the experts to the CPU."""

LoadMode = Literal["none", "mmap", "mlock", "mmap+mlock", "dio"]
FlashAttention = Literal["on", "off", "auto"]


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a decision was taken: `what` was decided, `because` of what, with the `numbers` behind it."""

    what: str
    because: str
    numbers: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Workload:
    """What the plan is for: tokens per turn (`prompt`, `generate`) and `depth`, those already in context."""

    prompt: int = 1024
    generate: int = 512
    depth: int = 4096

    @property
    def tokens(self) -> int:
        """Context that one turn needs at its end."""
        return self.prompt + self.generate + self.depth


WORKLOADS = {
    "chat": Workload(),
    "code": Workload(prompt=4096, generate=1024, depth=12_288),
    "documents": Workload(prompt=16_384, generate=512, depth=0),
    "agent": Workload(prompt=2048, generate=256, depth=24_576),
}
"""Typical turns: a question with a page pasted in; an edit with some files; a long text and its summary; a
tool's output and the next call. Round figures of our own; `-p -n -d` state another."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Memory one device may use. `kind` is `host`, `gpu` or `rpc`; `name` is the engine's device name.

    `buffer_type` is the name of the device's own buffer type in the engine: `CUDA0`, or
    `RPC0[127.0.0.1:50052]`; for the host it is `CPU`.
    """

    name: str
    kind: Literal["host", "gpu", "rpc"]
    budget_bytes: int
    buffer_type: str


@dataclass(frozen=True, slots=True)
class Override:
    """One `-ot` rule: tensors whose name matches `pattern` (`regex_search`) live in buffer type `buffer`."""

    pattern: str
    buffer: str


@dataclass(frozen=True, slots=True)
class Placement:
    """Where every tensor lives and how the engine is started.

    `devices` are the offload devices by engine name, in order, empty for CPU only; `rpc_servers` are the
    `host:port` endpoints registered before loading (device `RPC<i>` is the i-th endpoint). `n_gpu_layers`
    counts the output layer, as `-ngl` does. `overrides` are tried in order, the first match wins.
    `context` is the total over `parallel` sequences, as `-c` is. `extra_buffers` is llama.cpp's
    `use_extra_bufts`: whether it may repack weights by itself (`--no-repack` when False). `outputs_max` is
    the most tokens of one batch that yield logits (llama.cpp's `n_outputs_max`; 0 means every token of the
    batch, which costs ubatch × vocabulary × 4 bytes of compute buffer; llama-server uses `parallel`).
    `recurrent_rollback` is `n_rs_seq`, snapshots of the recurrent state beyond the current one.
    """

    devices: tuple[str, ...] = ()
    rpc_servers: tuple[str, ...] = ()
    n_gpu_layers: int = 0
    cpu_expert_layers: tuple[int, ...] = ()
    overrides: tuple[Override, ...] = ()
    tensor_split: tuple[float, ...] | None = None
    context: int = 4096
    batch: int = 2048
    ubatch: int = 512
    kv_type_k: str = "f16"
    kv_type_v: str = "f16"
    flash_attention: FlashAttention = "on"
    threads: int = 1
    threads_batch: int = 1
    load_mode: LoadMode = "none"
    parallel: int = 1
    extra_buffers: bool = False
    kv_unified: bool = False
    kv_offload: bool = True
    op_offload: bool = True
    outputs_max: int = 0
    swa_full: bool = False
    load_mtp: bool = False
    recurrent_rollback: int = 0


MODEL_FIELDS = (
    "devices",
    "rpc_servers",
    "n_gpu_layers",
    "overrides",
    "tensor_split",
    "load_mode",
    "extra_buffers",
    "load_mtp",
)
"""The fields of a placement that decide how a model is loaded; the others are its context's."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes on one device, planned or allocated; the same keys in plans and records so they lie side by side.

    `kv_bytes` is the attention cache, `recurrent_bytes` the DeltaNet/SSM state, `compute_bytes` the graph's
    scratch buffer, `other_bytes` the output buffer. Mapped files and repacked copies count as weights.
    """

    name: str
    kind: Literal["host", "gpu", "rpc"]
    budget_bytes: int | None
    weights_bytes: int
    kv_bytes: int
    recurrent_bytes: int
    compute_bytes: int
    other_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Sum of all parts."""
        return (
            self.weights_bytes + self.kv_bytes + self.recurrent_bytes + self.compute_bytes + self.other_bytes
        )


def device_to_dict(device: DeviceMemory) -> dict[str, object]:
    """One entry of `devices` in the JSON of plans and records, the total included."""
    return {**asdict(device), "total_bytes": device.total_bytes}


@dataclass(frozen=True, slots=True)
class SpeedRange:
    """Tokens per second: `mid` is the forecast, `low` and `high` the range stated beside it."""

    low: float
    mid: float
    high: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """Forecast speeds; `source` says what they rest on (`roofline`, `slice` or `history`)."""

    decode_tps: SpeedRange | None
    prefill_tps: SpeedRange | None
    source: Literal["roofline", "slice", "history"]
