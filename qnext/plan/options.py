"""What a plan is asked for: the user's wishes, in llama.cpp's terms. None means "choose for me"."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from qnext.plan.values import FlashAttention, LoadMode, Override, Workload

Preference = Literal["quality", "balanced", "speed"]

RepackPolicy = Literal["full", "experts", "off"]
"""How CPU weights are laid out: `full` leaves it to the engine, `experts` names CPU_REPACK for the routed
experts that support it and nothing else (avoids the AMX buffers), `off` keeps the file's layout."""

DEFAULT_CONTEXT = 32_768
SMALLEST_CONTEXT = 4_096

MOST_SLOTS = 4
"""Conversations at once that a plan offers unasked for a number; llama-server's own default."""

CPU_UBATCH = 512
GPU_UBATCHES = (2048, 1024, 512)
"""Physical batches to try beside a GPU: 2048 instead of 512 tripled the prefill of an offloaded model."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user may ask of a plan. Everything from `n_gpu_layers` down forces that part of the placement.

    `context` counts all `parallel` sequences together, as `-c` does. Cache types are llama.cpp's; with one of
    them named, the other is f16. `prefer` is what to give up first where not everything fits. `cpu_experts`
    is `--n-cpu-moe`: the experts of that many first layers stay on the host (`--cpu-moe`: all layers).
    """

    workload: Workload = field(default_factory=Workload)
    context: int | None = None
    parallel: int | None = 1
    batch: int = 2048
    ubatch: int | None = None
    kv_type_k: str | None = None
    kv_type_v: str | None = None
    prefer: Preference = "balanced"
    flash_attention: FlashAttention = "on"
    load_mode: LoadMode = "none"
    n_gpu_layers: int | None = None
    cpu_experts: int | None = None
    overrides: tuple[Override, ...] = ()
    tensor_split: tuple[float, ...] | None = None

    def wishes(self) -> dict[str, Any]:
        """The fields of Wishes by name, without those that a class made from it adds."""
        return {wish.name: getattr(self, wish.name) for wish in fields(Wishes)}


@dataclass(frozen=True, slots=True)
class PlanOptions(Wishes):
    """Wishes for one plan, with what the machine decided where the user did not.

    `threads` and `threads_batch` are those of decode and prefill; `repack_asked` says that the layout is the
    user's wish, which is obeyed even where it is risky.
    """

    threads: int = 1
    threads_batch: int = 1
    repack: RepackPolicy = "full"
    repack_asked: bool = False
