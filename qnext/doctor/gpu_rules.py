"""What holds the GPUs back: the link, the power limit, memory that others hold."""

from __future__ import annotations

from collections.abc import Iterator

from qnext.doctor.case import Case
from qnext.doctor.values import Finding, Level
from qnext.hardware.machine import Gpu
from qnext.plan.machine_speeds import COPIED_SHARE, pcie_rate
from qnext.units import GIB, format_bytes

HELD_SHARE = 0.1
"""VRAM in use from this share of the card on is worth a word; a desktop's own use lies below it."""
_ORDINARY_VRAM_SHARE = 0.97
_LISTERS = {"cuda": "nvidia-smi", "rocm": "rocm-smi --showpids"}
_ORDINARY_REASONS = ("power cap", "sync boost", "display clocks")
"""Any card at work is at its power limit; the others are settings."""
SLOW_COPY_SHARE = 0.5
"""A measured copy below this share of the link's rate is slow: 0.8 is usual."""


def gpu_findings(case: Case) -> Iterator[Finding]:
    """Findings about each GPU. Nothing for GPUs that share the host's memory: they have no link."""
    for position, gpu in enumerate(case.machine.gpus):
        if not case.machine.unified_memory:
            yield from _link(case, position, gpu)
            yield from _held(case, position, gpu)
        yield from _power(case, position, gpu)


def _link(case: Case, position: int, gpu: Gpu) -> Iterator[Finding]:
    """The link as it is under load, else at its best, against what the card could do."""
    generation = gpu.pcie_gen_loaded or gpu.pcie_gen_max
    width = gpu.pcie_width_loaded or gpu.pcie_width_max
    best_generation = gpu.pcie_gen_card_max or gpu.pcie_gen_max
    best_width = gpu.pcie_width_card_max or gpu.pcie_width_max
    if not (generation and width and best_generation and best_width):
        return
    now, best = pcie_rate(generation, width), pcie_rate(best_generation, best_width)
    mended = case.with_gpu(
        position,
        pcie_gen_loaded=best_generation,
        pcie_width_loaded=best_width,
        h2d_pinned_bps=round(best * COPIED_SHARE) if gpu.h2d_pinned_bps else None,
    )
    if now < best:
        measured = "under load" if gpu.pcie_gen_loaded else "at most"
        level, why, fix = _remedy(gpu, generation, width, best_width)
        yield Finding(
            id="gpu-link",
            level=level,
            about=f"gpus.{position}.link",
            what=f"{_name(gpu)} runs on PCIe {generation}.0 x{width} {measured}, it can do "
            f"{best_generation}.0 x{best_width}",
            because=f"a prompt copies the experts in RAM over this link once per ubatch: {now / 1e9:.0f} "
            f"instead of {best / 1e9:.0f} GB/s{why}",
            fix=fix,
            price=case.price(mended),
        )
    elif gpu.h2d_pinned_bps and gpu.h2d_pinned_bps < SLOW_COPY_SHARE * now:
        yield Finding(
            id="gpu-copies-slow",
            level="warning",
            about=f"gpus.{position}.link",
            what=f"copies to {_name(gpu)} reach {gpu.h2d_pinned_bps / 1e9:.1f} GB/s of a link of "
            f"{now / 1e9:.0f} GB/s",
            because="link errors, a riser, a virtual machine's IOMMU or another program on the link slow it",
            fix="Look for PCIe errors (sudo dmesg | grep -i pcie) and measure again: qnext doctor --full",
            price=case.price(mended),
        )


def _remedy(gpu: Gpu, generation: int, width: int, best_width: int) -> tuple[Level, str, str]:
    """(level, what holds the link down, what to do) where lanes or generation are fewer than the card has."""
    if width < best_width:
        if gpu.pcie_width_slot_max and gpu.pcie_width_slot_max <= width:
            fix = "Use a slot with more lanes, if the board has one: two cards often share sixteen."
            return "warning", f"; the slot has {gpu.pcie_width_slot_max} lanes", fix
    elif gpu.pcie_gen_slot_max and gpu.pcie_gen_slot_max <= generation:
        why = f"; the board is of generation {gpu.pcie_gen_slot_max}"
        return "info", why, "Nothing to do on this board: it knows no faster generation."
    fix = (
        "Move the card to the slot nearest the CPU, check riser cables, and set the slot's speed to Auto in "
    )
    return "warning", "", fix + "the firmware's setup."


def _held(case: Case, position: int, gpu: Gpu) -> Iterator[Finding]:
    total, free = gpu.vram_total_bytes, gpu.vram_free_bytes
    if not total or free is None:
        return
    held = gpu.vram_others_bytes if gpu.vram_others_bytes is not None else total - free
    if held < max(HELD_SHARE * total, GIB // 2):
        return
    who = f"by {gpu.processes} other programs" if gpu.processes else "by other programs or the desktop"
    yield Finding(
        id="gpu-memory-held",
        level="warning",
        about=f"gpus.{position}.memory",
        what=f"{format_bytes(held)} of {_name(gpu)} are held {who}",
        because="each layer's experts that do not fit on the GPU are read from RAM for every token",
        fix=f"Close them ({_LISTERS.get(gpu.kind or '', 'nvtop')} lists them), or run the desktop on another "
        "GPU.",
        price=case.price(
            case.with_gpu(position, vram_free_bytes=min(round(total * _ORDINARY_VRAM_SHARE), free + held))
        ),
    )


def _power(case: Case, position: int, gpu: Gpu) -> Iterator[Finding]:
    limit, usual = gpu.power_limit_w, gpu.power_default_w
    if limit and usual and limit < 0.95 * usual:
        yield Finding(
            id="gpu-power-cap",
            level="warning",
            about=f"gpus.{position}.power",
            what=f"{_name(gpu)} is limited to {limit} W of {usual}",
            because="under the limit it lowers its clocks, which slows prefill; decode waits for memory",
            fix=f"sudo nvidia-smi -i {gpu.pci_bus_id or position} -pl {usual}"
            if gpu.kind == "cuda"
            else f"Raise the limit to {usual} W.",
            price=case.price(case.with_gpu(position, power_limit_w=usual)),
        )
    faults = [reason for reason in gpu.throttle_reasons or () if reason not in _ORDINARY_REASONS]
    if faults:
        yield Finding(
            id="gpu-throttled",
            level="warning",
            about=f"gpus.{position}.power",
            what=f"{_name(gpu)} holds its clocks down: {', '.join(faults)}",
            because="the driver says so at this moment",
            fix="Look after cooling and power supply; then look again under load.",
            unpriced="it depends on how long it lasts; qnext bench run shows it",
        )


def _name(gpu: Gpu) -> str:
    return gpu.name or "a GPU"
