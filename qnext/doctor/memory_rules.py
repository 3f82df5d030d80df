"""What is wrong with the memory: too little of it, too slow, limited, swapped, on the wrong node."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from qnext.doctor.case import Case
from qnext.doctor.values import Finding
from qnext.plan.machine_speeds import RATED_SHARE, thread_counts
from qnext.plan.speed import CORE_READ_BPS, FALLBACK_RAM_BPS
from qnext.plan.values import HOST
from qnext.units import GIB, MIB, format_bytes

SLOW_SHARE = 0.5
"""Below this share of what it should read memory is slow: a read loop on a healthy desktop reaches about 0.8
of the rating, a processor of one chiplet some 0.6."""
SWAP_IN_USE_BYTES = 512 * MIB
_NUMA_NEAREST = (None, "default", "local")
"""Policies that put a page on the node of the thread that first writes it; others were chosen by someone."""


def memory_findings(case: Case) -> Iterator[Finding]:
    """Findings about RAM, each priced where the speed model knows of it."""
    yield from _unknown(case)
    yield from _size(case)
    yield from _channels(case)
    yield from _profile(case)
    yield from _slow(case)
    yield from _limit(case)
    yield from _swap(case)
    yield from _numa(case)
    yield from _locked(case)
    yield from _huge_pages(case)


def _unknown(case: Case) -> Iterator[Finding]:
    if not case.supposes_memory:
        return
    yield Finding(
        id="memory-unknown",
        level="warning",
        about="memory.size",
        what="how much RAM there is could not be read",
        because="nothing can be planned without it",
        fix="Say how much may be used: --ram 32G.",
        unpriced="prices are for a machine with enough of it",
    )


def _size(case: Case) -> Iterator[Finding]:
    missing = case.missing.get(HOST)
    if not missing:
        return
    memory = case.machine.memory
    yield Finding(
        id="memory-too-small",
        level="error" if case.named else "warning",
        about="memory.size",
        what=f"too little RAM for {case.model}: {format_bytes(missing)} missing",
        because=f"{format_bytes(memory.usable_bytes)} can be used of {format_bytes(memory.total_bytes)}; the "
        f"model needs {format_bytes((memory.usable_bytes or 0) + missing)} beside what its GPUs hold",
        fix=f"Use {case.would_fit}; or add RAM."
        if case.would_fit and "smaller than any" not in case.would_fit
        else "Take a smaller model, or add RAM.",
        unpriced="it does not run at all",
    )


def _channels(case: Case) -> Iterator[Finding]:
    memory = case.machine.memory
    filled, most = memory.channels, memory.channels_max
    if not filled or not (most or filled == 1) or filled >= (most or 2):
        return
    target = most or 2
    better = _times(case, target / filled)
    yield Finding(
        id="memory-channels",
        level="warning",
        about="memory.modules",
        what="memory in one channel" if filled == 1 else f"memory in {filled} of {target} channels",
        because="decode is bound by memory bandwidth, and each channel adds its own",
        fix=f"Spread the modules over all {target} channels (the mainboard's manual names the slots).",
        price=case.price(case.with_memory(**better)),
    )


def _profile(case: Case) -> Iterator[Finding]:
    memory = case.machine.memory
    now, rated = memory.speed_mtps, memory.speed_max_mtps
    if not now or not rated or now >= 0.95 * rated:
        return
    yield Finding(
        id="memory-profile",
        level="warning",
        about="memory.modules",
        what=f"memory runs at {now} MT/s, its modules are made for {rated}",
        because="the faster setting is a memory profile (XMP or EXPO) that the firmware has to switch on",
        fix="Switch on XMP or EXPO in the firmware's setup, then test the memory. Servers, laptops and "
        "boards with four modules may be held to the lower speed by the CPU.",
        price=case.price(case.with_memory(**_times(case, rated / now))),
    )


def _slow(case: Case) -> Iterator[Finding]:
    memory = case.machine.memory
    measured, rated = memory.measured_bandwidth_bps, memory.rated_bandwidth_bps
    if not measured or not rated or case.machine.unified_memory:
        return  # a common memory is rated for the GPU, of which the CPU draws a part
    reachable = min(rated, thread_counts(case.machine)[0] * CORE_READ_BPS)
    if measured >= SLOW_SHARE * reachable:
        return
    yield Finding(
        id="memory-slow",
        level="warning",
        about="memory.bandwidth",
        what=f"memory reads {measured / 1e9:.1f} GB/s, {measured / rated:.0%} of its rating",
        because=f"rated for {rated / 1e9:.1f} GB/s; about {RATED_SHARE:.0%} of that is usual",
        fix="Look for other programs at work, modules in one channel, a memory profile that is off; then "
        "measure again with qnext doctor --full.",
        price=case.price(case.with_memory(measured_bandwidth_bps=round(RATED_SHARE * rated))),
    )


def _limit(case: Case) -> Iterator[Finding]:
    memory = case.machine.memory
    limit, total = memory.limit_bytes, memory.total_bytes
    if not limit or not total or limit >= total:
        return
    where = case.machine.sources.get("memory.limit_bytes", "")
    freed = total if memory.available_bytes is None else memory.available_bytes
    yield Finding(
        id="memory-limit",
        level="info" if case.fits else "warning",
        about="memory.limit",
        what=f"a control group limits memory to {format_bytes(limit)} of {format_bytes(total)}",
        because=f"set in {where}" if where.startswith("/") else "a container, service or batch job sets it",
        fix="Raise the container's or the job's memory limit (docker run --memory, systemd MemoryMax).",
        price=case.price(case.with_memory(limit_bytes=None, usable_bytes=freed)),
    )


def _swap(case: Case) -> Iterator[Finding]:
    memory = case.machine.memory
    if memory.swap_total_bytes is None or memory.swap_free_bytes is None:
        return
    used = memory.swap_total_bytes - memory.swap_free_bytes
    if used < SWAP_IN_USE_BYTES or case.machine.os not in (None, "linux"):
        return  # macOS and Windows move idle pages to swap in good times too
    yield Finding(
        id="swap-in-use",
        level="info" if case.fits else "warning",
        about="memory.swap",
        what=f"{format_bytes(used)} of swap are in use",
        because="a page that comes back from swap takes a thousand times as long as one from RAM, and "
        "weights that are swapped out are read for every token",
        fix="Close what takes the memory, then: sudo swapoff -a && sudo swapon -a",
        unpriced="it depends on what was swapped out; a plan of qnext never counts on swap",
    )


def _numa(case: Case) -> Iterator[Finding]:
    memory = case.machine.memory
    nodes = [node for node in memory.numa_nodes or () if node.logical_cores != 0]
    if len(nodes) < 2 or memory.numa_policy not in _NUMA_NEAREST:
        return
    here = [node.measured_bandwidth_bps for node in nodes if node.measured_bandwidth_bps]
    whole = memory.measured_bandwidth_bps or round((memory.rated_bandwidth_bps or 0) * RATED_SHARE)
    one = max(here) if here else whole // len(nodes)
    finding = Finding(
        id="numa-not-interleaved",
        level="warning",
        about="memory.nodes",
        what=f"memory of {len(nodes)} NUMA nodes is not interleaved",
        because="pages lie on the node of the thread that first wrote them: while the model loads that is "
        "one node, and all cores then read through its channels",
        fix="Start it as: numactl --interleave=all qnext …",
        unpriced="the bandwidth of the nodes is not known: qnext doctor --full measures it",
    )
    if not one or not whole:
        yield finding
        return
    price = case.price(
        case.here,
        now=case.with_memory(measured_bandwidth_bps=one),
        supposing="all of the model lies on one node",
    )
    yield replace(finding, price=price, unpriced="")


def _locked(case: Case) -> Iterator[Finding]:
    """Only for GPUs whose driver counts pinned memory against the limit: ROCm's and Vulkan's."""
    limit = case.machine.memory.locked_limit_bytes
    placed = case.now.placed
    host = placed.memory.devices[0].weights_bytes
    pins = any(not name.startswith(("CUDA", "MTL")) for name in placed.placement.devices)
    if limit is None or limit >= host or not pins or case.machine.unified_memory:
        return
    unpinned = replace(case.here, wishes=replace(case.here.wishes, load_mode="mmap"))
    yield Finding(
        id="locked-memory",
        level="info",
        about="memory.locking",
        what=f"only {format_bytes(limit)} may be locked, the weights in RAM take {format_bytes(host)}",
        because="copies to the GPU are fastest from locked (pinned) memory",
        fix="Raise it: ulimit -l unlimited, or LimitMEMLOCK=infinity in the service.",
        price=case.price(case.here, now=unpinned, supposing="the driver then refuses to pin"),
    )


def _huge_pages(case: Case) -> Iterator[Finding]:
    memory = case.machine.memory
    if memory.transparent_hugepages == "never":
        yield Finding(
            id="huge-pages-off",
            level="info",
            about="memory.pages",
            what="transparent huge pages are off",
            because="expert weights are read at random places: with 4 KiB pages each read may first walk the "
            "page table",
            fix="echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
            unpriced="no published figure for it that could be checked here; a few per cent at most",
        )
    free = memory.hugepages_free_bytes or 0
    if free >= GIB:
        yield Finding(
            id="huge-pages-reserved",
            level="info",
            about="memory.pages",
            what=f"{format_bytes(free)} of RAM are set aside as huge pages and not in use",
            because="the engine does not use them, and nothing else can",
            fix="sudo sysctl vm.nr_hugepages=0, unless a program to be started needs them.",
            price=case.price(case.with_memory(usable_bytes=(memory.usable_bytes or 0) + free)),
        )


def _times(case: Case, factor: float) -> dict[str, int]:
    """The bandwidths that the machine would have at `factor` times its memory's present rate."""
    memory = case.machine.memory
    changed = {}
    if memory.measured_bandwidth_bps:
        changed["measured_bandwidth_bps"] = round(memory.measured_bandwidth_bps * factor)
    if memory.rated_bandwidth_bps:
        changed["rated_bandwidth_bps"] = round(memory.rated_bandwidth_bps * factor)
    return changed or {"measured_bandwidth_bps": round(FALLBACK_RAM_BPS * factor)}
