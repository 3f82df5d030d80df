"""The list of hardware profiles for people, in 80 columns: what decides a plan, a line for each machine."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qnext.hardware import Gpu, Machine
from qnext.units import GIB

if TYPE_CHECKING:
    from rich.console import Group

_CPU_NOISE = re.compile(
    r"\(R\)|\(TM\)|\d+(st|nd|rd|th) Gen |Intel|AMD|CPU|Processor|\d+-Core|@.*|w/.*| and .*", re.IGNORECASE
)
_GPU_NOISE = re.compile(r"NVIDIA|GeForce|AMD|Radeon|Apple|Graphics|\(TM\)", re.IGNORECASE)

_LEGEND = "cores, RAM: what may be used. GB/s: rated, of the RAM. shared: with the CPU."


def profiles_view(rows: Sequence[tuple[Machine, bool]]) -> Group:
    """A table of machines, each with whether it is the user's own."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("name", "CPU", "cores", "RAM", "GB/s", "GPUs", "from"):
        number = title in {"cores", "RAM", "GB/s"}
        wraps = title in {"CPU", "GPUs"}
        table.add_column(title, justify="right" if number else "left", no_wrap=not wraps, overflow="fold")
    for machine, own in rows:
        memory = machine.memory
        table.add_row(
            machine.name,
            _short(machine.cpu.model, _CPU_NOISE),
            str(machine.cpu.usable_cores or "–"),
            _size(memory.limit_bytes or memory.total_bytes),
            "–" if memory.rated_bandwidth_bps is None else f"{memory.rated_bandwidth_bps / 1e9:.0f}",
            "\n".join(_gpus(machine)) or "–",
            "you" if own else "qnext",
            style="bold" if own else None,
        )
    return Group(table, Text(_LEGEND, style="dim"))


def _gpus(machine: Machine) -> list[str]:
    """`RTX 4090 24G`, `2 x RTX 3090 24G`, `GB10, shared`: a line per kind of GPU."""
    counts = Counter(_gpu(gpu, shared=bool(machine.unified_memory)) for gpu in machine.gpus)
    return [line if count == 1 else f"{count} x {line}" for line, count in counts.items()]


def _gpu(gpu: Gpu, *, shared: bool) -> str:
    name = _short(gpu.name, _GPU_NOISE)
    return f"{name}, shared" if shared else f"{name} {_size(gpu.vram_total_bytes)}"


def _size(count: int | None) -> str:
    """`24G`, as flags take it."""
    return "–" if count is None else f"{count / GIB:.0f}G"


def _short(name: str | None, noise: re.Pattern[str]) -> str:
    """A product's name without what every one of its kind has in it."""
    words = noise.sub(" ", name or "").split()
    return " ".join(words) or (name or "–")
