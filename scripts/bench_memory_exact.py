#!/usr/bin/env python3
"""Lays planned bytes beside what llama.cpp allocates, for every family, device, cache type and slot count.

    scripts/bench_memory_exact.py [--quick]

Weights, cache, recurrent state and output buffer: megabyte-sized models of each family are really loaded, on
the CPU and with a loopback RPC worker, and every "… buffer size" line of the log is compared with the plan.
The log prints MiB with two decimals, so half of 0.01 MiB per line is the resolution; a model of 256 layers
makes the padding of small tensors larger than that. Compute buffers: a dry run against the real load on the
same models, and the estimate (`qnext.plan.compute`) against dry runs of the published models' full shapes,
whose files are headers with a hole. Needs the engine with RPC; takes five minutes on
two cores, with `--quick` one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from qnext.engine.log_reader import BufferSize, read_buffer_sizes  # noqa: E402
from qnext.engine.rpc import RpcWorker  # noqa: E402
from qnext.engine.session import EngineSession  # noqa: E402
from qnext.hardware import detect_machine  # noqa: E402
from qnext.models.gguf_reader import read_header  # noqa: E402
from qnext.models.header import ModelHeader  # noqa: E402
from qnext.models.shape import ModelShape, read_shape  # noqa: E402
from qnext.models.synth.synthesise import synthesise  # noqa: E402
from qnext.plan.memory import MemoryPlan, plan_memory  # noqa: E402
from qnext.plan.traits import DeviceTraits, host_traits  # noqa: E402
from qnext.plan.values import CPU_REPACK, HOST, Budget, Override, Placement  # noqa: E402
from qnext.units import GIB, MIB  # noqa: E402

TINY = (
    "tiny-qwen3next",
    "tiny-qwen3next-ssm-in",
    "tiny-qwen3next-fused",
    "tiny-qwen3next-mtp",
    "tiny-qwen3moe",
    "tiny-gpt-oss",
    "tiny-qwen3",
)
FULL = ("qwen3-next-80b-a3b", "qwen3-30b-a3b", "gpt-oss-20b")
HALF_PRINTED_UNIT = 0.00501 * MIB
EXPERTS = r"blk\.({})\.ffn_(up|down|gate_up|gate)_exps"
PARTS = {"model": "weights", "KV": "kv", "RS": "recurrent", "output": "output"}


@dataclass
class Model:
    """A file, its header and its shape."""

    path: Path
    header: ModelHeader
    shape: ModelShape


@dataclass
class Tally:
    """What was found so far."""

    combinations: int = 0
    worst_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS.values(), 0))
    failures: list[str] = field(default_factory=list)
    dry_run_worst_ratio: float = 1.0
    estimates: int = 0
    estimate_worst_ratio: float = 1.0
    estimate_worst_case: str = ""


class Bench:
    """Two engine children, one of them with an RPC worker as its second device."""

    def __init__(
        self, folder: Path, worker: RpcWorker, on_cpu: EngineSession, on_both: EngineSession
    ) -> None:
        self._folder = folder
        self._worker = worker
        self._sessions = {False: on_cpu, True: on_both}
        self._host = host_traits(detect_machine(folder).cpu.instruction_sets or ())
        self._remote = Budget("RPC0", "rpc", 1024 * GIB, f"RPC0[{worker.endpoint}]")
        self._registered = False
        self.tally = Tally()

    def make(self, shape: str, quant: str, *, layers: int | None = None) -> Model:
        """A header with a hole: a model whose weights are all zero, real enough to be allocated."""
        path = self._folder / f"{shape}-{layers or 0}-{quant}.gguf"
        synthesise(shape, path, quant=quant, layers=layers, header_only=True)
        header = read_header(path)
        return Model(path, header, read_shape(header))

    def plan(self, model: Model, placement: Placement) -> MemoryPlan:
        """The plan under test."""
        budgets = [Budget(HOST, "host", 1024 * GIB, HOST)]
        devices = []
        if placement.devices:
            budgets.append(self._remote)
            devices.append(DeviceTraits("RPC0", "rpc", self._remote.buffer_type))
        return plan_memory(model.header, model.shape, placement, budgets, host=self._host, devices=devices)

    def sizes(self, model: Model, placement: Placement, *, dry: bool) -> list[BufferSize]:
        """What the engine says of the sizes of one load or dry run."""
        session = self._sessions[bool(placement.devices)]
        if placement.devices and not self._registered:
            self._registered = True
            placement = replace(placement, rpc_servers=(self._worker.endpoint,))
        if dry:
            return session.dry_run(str(model.path), placement)
        session.open(str(model.path), placement)
        return read_buffer_sizes(session.size_lines)

    def compare(self, model: Model, placement: Placement, *, dry_too: bool) -> None:
        """Load for real; every line of the log against the plan."""
        plan = self.plan(model, placement)
        planned: dict[tuple[str, str], int] = defaultdict(int)
        for buffer, size in plan.buffers.items():
            planned["model", buffer] = size
        for device in plan.devices:
            buffer = HOST if device.name == HOST else self._remote.buffer_type
            planned["KV", buffer] = device.kv_bytes
            planned["RS", buffer] = device.recurrent_bytes
            planned["output", buffer] = device.other_bytes
        printed, lines = _sum(self.sizes(model, placement, dry=False))
        self.tally.combinations += 1
        for part, buffer in sorted(set(planned) | {key for key in printed if key[0] in PARTS}):
            off = abs(planned[part, buffer] - printed[part, buffer])
            name = PARTS[part]
            self.tally.worst_bytes[name] = max(self.tally.worst_bytes[name], off)
            if off > HALF_PRINTED_UNIT * max(1, lines[part, buffer]):
                self.tally.failures.append(
                    f"{model.path.stem} {_say(placement)}: {part} in {buffer}: planned"
                    f" {planned[part, buffer]}, allocated {printed[part, buffer]}"
                )
        if dry_too:
            dry, _ = _sum(self.sizes(model, placement, dry=True))
            for key, size in printed.items():
                if key[0] == "compute":
                    self.tally.dry_run_worst_ratio = max(
                        self.tally.dry_run_worst_ratio, _ratio(dry[key], size)
                    )

    def estimate(self, model: Model, placement: Placement) -> None:
        """The estimate of the compute buffers against a dry run."""
        printed, _ = _sum(self.sizes(model, placement, dry=True))
        for device in self.plan(model, placement).devices:
            buffer = HOST if device.name == HOST else self._remote.buffer_type
            ratio = _ratio(device.compute_bytes, printed["compute", buffer])
            self.tally.estimates += 1
            if ratio > self.tally.estimate_worst_ratio:
                self.tally.estimate_worst_ratio = ratio
                self.tally.estimate_worst_case = (
                    f"{model.path.stem} {_say(placement)} {device.name}: estimated"
                    f" {device.compute_bytes / MIB:.1f} MiB, reserved {printed['compute', buffer] / MIB:.1f}"
                )


def run(*, quick: bool = False) -> dict[str, object]:
    """All comparisons; failures are lines of text, sizes bytes, ratios at least 1."""
    with (
        tempfile.TemporaryDirectory() as folder,
        RpcWorker() as worker,
        EngineSession() as on_cpu,
        EngineSession() as on_both,
    ):
        bench = Bench(Path(folder), worker, on_cpu, on_both)
        for name in TINY:
            for quant in ("Q4_K_M",) if quick else ("Q4_K_M", "Q8_0", "BF16"):
                model = bench.make(name, quant)
                for placement in _placements(model.shape):
                    bench.compare(model, placement, dry_too=quant == "Q4_K_M")
        padded = bench.make("tiny-qwen3next", "Q4_K_M", layers=64 if quick else 256)
        for devices in ((), ("RPC0",)):
            bench.compare(padded, Placement(devices=devices, n_gpu_layers=-1, context=256), dry_too=False)
        for name in FULL:
            model = bench.make(name, "Q4_K_M")
            for placement in _full_placements(model.shape, quick=quick):
                bench.estimate(model, placement)
        tally = bench.tally
    return {
        "combinations": tally.combinations,
        "worst_bytes": tally.worst_bytes,
        "failures": tally.failures,
        "compute_dry_run_worst_ratio": round(tally.dry_run_worst_ratio, 4),
        "compute_estimates": tally.estimates,
        "compute_estimate_worst_ratio": round(tally.estimate_worst_ratio, 3),
        "compute_estimate_worst_case": tally.estimate_worst_case,
    }


def _placements(shape: ModelShape) -> Iterator[Placement]:
    """CPU and CPU + RPC, × cache type × slots, then the other ways to load on the first of them."""
    half = shape.n_layer // 2
    tail = "|".join(map(str, range(half, shape.n_layer)))
    experts = Override(EXPERTS.format(tail), HOST)
    base = Placement(context=5000, batch=512, ubatch=256, threads=2, threads_batch=2)
    remote = replace(base, devices=("RPC0",), n_gpu_layers=999)
    for cache_type in ("f16", "q8_0"):
        for slots in (1, 4):
            kinds = {"kv_type_k": cache_type, "kv_type_v": cache_type, "parallel": slots}
            yield replace(base, **kinds)
            yield replace(remote, **kinds)
            yield replace(remote, overrides=(experts,), **kinds)
    yield replace(base, parallel=4, kv_unified=True)
    yield replace(base, parallel=3, outputs_max=3, swa_full=True)
    yield replace(base, load_mode="mmap")
    yield replace(base, extra_buffers=True)
    yield replace(base, extra_buffers=True, load_mode="mmap")
    yield replace(base, load_mtp=True)
    yield replace(remote, n_gpu_layers=half, load_mode="mmap")
    yield replace(remote, n_gpu_layers=half, kv_offload=False)
    yield replace(remote, n_gpu_layers=shape.n_layer_all, extra_buffers=True, overrides=(experts,))
    if not shape.dense and shape.quant == "Q4_K_M":
        # Only what the repack supports may be named for it; the down projections of some layers are Q6_K.
        gates = Override(r"ffn_(up|gate_up|gate)_exps\.weight", CPU_REPACK)
        yield replace(base, overrides=(gates,))


def _full_placements(shape: ModelShape, *, quick: bool) -> Iterator[Placement]:
    tail = "|".join(map(str, range(shape.n_layer // 3, shape.n_layer)))
    spread: tuple[dict[str, object], ...] = (
        {},
        {"devices": ("RPC0",), "n_gpu_layers": 999},
        {"devices": ("RPC0",), "n_gpu_layers": 999, "overrides": (Override("_exps", HOST),)},
        {
            "devices": ("RPC0",),
            "n_gpu_layers": 999,
            "overrides": (Override(EXPERTS.format(tail), HOST),),
        },
    )
    for ubatch in (512,) if quick else (128, 512, 2048, 4096):
        for context in (4096, 32768, 262144):
            for outputs in (0, 1):
                for where in spread:
                    yield replace(
                        Placement(context=context, batch=max(2048, ubatch), ubatch=ubatch),
                        outputs_max=outputs,
                        **where,  # type: ignore[arg-type]
                    )


def _sum(found: list[BufferSize]) -> tuple[dict[tuple[str, str], int], dict[tuple[str, str], int]]:
    """Bytes and number of buffers per part and buffer type."""
    sizes: dict[tuple[str, str], int] = defaultdict(int)
    lines: dict[tuple[str, str], int] = defaultdict(int)
    for size in found:
        sizes[size.part, size.buffer] += size.bytes
        lines[size.part, size.buffer] += 1
    return sizes, lines


def _ratio(one: int, other: int) -> float:
    if one == other:
        return 1.0
    return max(one, other) / max(1, min(one, other))


def _say(placement: Placement) -> str:
    """The fields that differ from the defaults."""
    default = Placement()
    return " ".join(
        f"{name}={getattr(placement, name)}"
        for name in Placement.__dataclass_fields__
        if getattr(placement, name) != getattr(default, name)
    )


def main() -> int:
    """Print the result as JSON; status 1 when a byte is off."""
    parser = argparse.ArgumentParser(description="Compare planned memory with what llama.cpp allocates.")
    parser.add_argument("--quick", action="store_true", help="one quant, fewer ubatch sizes")
    result = run(quick=parser.parse_args().quick)
    print(json.dumps(result, indent=1))
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
