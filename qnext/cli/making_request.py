"""What the flags, the environment and the settings file ask for, as the pipeline's `Request`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qnext.cli.flags import MOST_SEQUENCES, PlanFlags
from qnext.errors import UsageError

if TYPE_CHECKING:
    from qnext.pipeline.request import Request
    from qnext.plan.values import Workload


def make_request(model: str, flags: PlanFlags, workload: Workload | None = None) -> Request:
    """The pipeline's Request from flags, environment and settings file, in that order of precedence."""
    from qnext.config import load_settings
    from qnext.pipeline.request import Request, parse_device_memory, parse_overrides
    from qnext.plan.values import Workload

    settings = load_settings(
        {
            "hardware": flags.hardware,
            "ram": flags.ram,
            "vram": flags.vram,
            "context": flags.context,
            "ubatch": flags.ubatch,
            "threads": flags.threads,
            "threads_batch": flags.threads_batch,
            "ctk": flags.cache_type_k,
            "ctv": flags.cache_type_v,
        }
    )
    if flags.min_tps is not None and not math.isfinite(flags.min_tps):
        raise UsageError(f"--min-tps {flags.min_tps} is not a speed", hint="Write a number: --min-tps 20.")
    cpu_experts = 10_000 if flags.cpu_moe else flags.n_cpu_moe
    repack = None if flags.repack == "auto" else _one_of("--repack", flags.repack, ("full", "experts", "off"))
    return Request(
        model=model,
        hardware=settings.hardware,
        ram=settings.ram_bytes,
        vram=settings.vram_bytes,
        ram_headroom=_size(flags.ram_headroom),
        vram_headroom=_size(flags.vram_headroom),
        device_memory=parse_device_memory(tuple(flags.device_memory or ())),
        rpc_servers=tuple(flags.rpc.split(",")) if flags.rpc else (),
        workload=workload or Workload(),
        context=settings.context,
        parallel=_slots(flags.parallel),
        batch=flags.batch,
        ubatch=settings.ubatch,
        kv_type_k=settings.ctk,
        kv_type_v=settings.ctv,
        flash_attention=_one_of("--flash-attn", flags.flash_attention, ("on", "off", "auto")),
        load_mode=_one_of("--load-mode", flags.load_mode, ("none", "mmap", "mlock", "mmap+mlock", "dio")),
        threads=settings.threads,
        threads_batch=settings.threads_batch,
        repack=repack,
        n_gpu_layers=flags.gpu_layers,
        cpu_experts=cpu_experts,
        overrides=parse_overrides(tuple(flags.override_tensor or ())),
        tensor_split=_shares(flags.tensor_split),
        prefer=_one_of("--prefer", flags.prefer, ("quality", "balanced", "speed")),
        min_tps=flags.min_tps,
    )


def workload_named(
    name: str, *, prompt: int | None = None, generate: int | None = None, depth: int | None = None
) -> Workload:
    """One of WORKLOADS, with the tokens that the user named. Raises UsageError naming them all."""
    from qnext.plan.values import WORKLOADS

    usual = WORKLOADS[_one_of("--workload", name, tuple(WORKLOADS))]
    given = {"prompt": prompt, "generate": generate, "depth": depth}
    return replace(usual, **{part: count for part, count in given.items() if count is not None})


def _size(text: str | None) -> int | None:
    from qnext.units import parse_size

    return None if text is None else parse_size(text)


def _slots(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MOST_SEQUENCES:
        raise UsageError(
            f"'{text}' is not a number of slots", hint=f"Write -np 1 to -np {MOST_SEQUENCES}, or -np auto."
        )
    return int(text)


def _one_of(option: str, value: str, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        raise UsageError(
            f"'{value}' is not a value of {option}", hint=f"Choose one of: {', '.join(choices)}."
        )
    return value


def _shares(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = ()
    if not shares or min(shares) < 0 or not any(shares):
        raise UsageError(f"'{text}' is not a tensor split", hint="Write shares with commas: -ts 3,1.")
    return shares
