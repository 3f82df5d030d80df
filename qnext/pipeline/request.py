"""What a command asks for, gathered in one value so that every trip starts from the same words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qnext.errors import UsageError
from qnext.plan.options import RepackPolicy, Wishes
from qnext.plan.values import Override
from qnext.units import parse_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Request(Wishes):
    """One request. None leaves the choice to the planner. Sizes in bytes.

    `hardware` replaces this machine by a recorded one, `what_if` changes some of its facts (see
    `qnext.plan.what_if`). `ram_headroom` and `vram_headroom` are left free of what was detected, instead of
    the usual margins. `rpc_servers` are `host:port` of llama.cpp workers, each sized by `device_memory`.
    `min_tps` (decode, tokens per second) is what the quant must reach where `model` leaves it open. `tuned`:
    run with what a sweep found, if there is any. The remaining names are llama.cpp's.
    """

    model: str
    hardware: str | None = None
    what_if: str | None = None
    ram: int | None = None
    vram: int | None = None
    ram_headroom: int | None = None
    vram_headroom: int | None = None
    device_memory: Mapping[str, int] = field(default_factory=dict)
    rpc_servers: tuple[str, ...] = ()
    threads: int | None = None
    threads_batch: int | None = None
    repack: RepackPolicy | None = None
    min_tps: float | None = None
    tuned: bool = False


def parse_overrides(texts: tuple[str, ...]) -> tuple[Override, ...]:
    """`-ot` arguments, each `PATTERN=BUFFER` or several with commas, as llama.cpp takes them."""
    rules = []
    for text in ",".join(texts).split(",") if texts else ():
        pattern, separator, buffer = text.partition("=")
        if not separator or not pattern or not buffer:
            raise UsageError(
                f"'{text}' is not an override", hint="Write -ot PATTERN=BUFFER, for example -ot 'exps=CPU'."
            )
        rules.append(Override(pattern, buffer))
    return tuple(rules)


def parse_device_memory(texts: tuple[str, ...]) -> dict[str, int]:
    """`--device-memory NAME=SIZE` arguments as bytes by device name."""
    sizes = {}
    for text in texts:
        name, separator, size = text.partition("=")
        if not separator or not name:
            raise UsageError(f"'{text}' names no device", hint="Write --device-memory CUDA0=14G.")
        sizes[name] = parse_size(size)
    return sizes
