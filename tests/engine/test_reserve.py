"""A dry run states what a load reserves, also where llama.cpp's own simulation is off; it takes no memory."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qnext.engine.log_reader import PRINT_RESOLUTION_BYTES, BufferSize, read_buffer_sizes
from qnext.engine.rpc import RpcWorker
from qnext.engine.session import EngineSession
from qnext.models.synth import synthesise
from qnext.plan.values import HOST, Override, Placement
from qnext.units import GIB

pytestmark = pytest.mark.engine

BASE = Placement(context=4096, batch=512, ubatch=256, threads=1, threads_batch=1)
TWO = replace(BASE, devices=("RPC0", "RPC1"), n_gpu_layers=999)
CASES = {
    "a pipeline": TWO,
    "a pipeline without flash attention": replace(TWO, flash_attention="off"),
    "experts of the border on the CPU": replace(
        TWO, tensor_split=(2.0, 7.0), overrides=(Override(r"blk\.[12]\.ffn_.*_exps", HOST),)
    ),
    "all experts on the CPU": replace(TWO, overrides=(Override("_exps", HOST),)),
    "the cache on the CPU": replace(TWO, kv_offload=False),
    "some layers, small batches": replace(TWO, n_gpu_layers=5, batch=16, ubatch=16),
    "one device, the cache on the CPU": replace(TWO, devices=("RPC0",), kv_offload=False),
    "one device, some layers": replace(TWO, devices=("RPC0",), n_gpu_layers=4, parallel=4),
    "no device": replace(BASE, parallel=3, outputs_max=3),
}


@pytest.fixture(scope="module")
def session() -> Iterator[EngineSession]:
    with RpcWorker() as one, RpcWorker() as two, EngineSession() as child:
        child.describe((one.endpoint, two.endpoint))
        yield child


def compute_sizes(sizes: Iterable[BufferSize]) -> dict[str, int]:
    found: defaultdict[str, int] = defaultdict(int)
    for size in sizes:
        if size.part == "compute":
            found[size.buffer] += size.bytes
    return found


@pytest.mark.parametrize("family", ["tiny-qwen3next", "tiny-qwen3moe", "tiny-gpt-oss"])
@pytest.mark.parametrize("case", CASES)
def test_a_dry_run_states_what_a_load_reserves(
    case: str, family: str, session: EngineSession, tmp_path: Path
) -> None:
    path = tmp_path / f"{family}.gguf"
    synthesise(family, path, quant="Q4_K_M", header_only=True)
    planned = compute_sizes(session.dry_run(str(path), CASES[case]))
    session.open(str(path), CASES[case])
    reserved = compute_sizes(read_buffer_sizes(session.size_lines))
    for buffer in planned.keys() | reserved.keys():
        assert abs(planned[buffer] - reserved[buffer]) <= PRINT_RESOLUTION_BYTES, buffer


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc tells a process's peak")
def test_a_dry_run_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    synthesise("qwen3-next-80b-a3b", path, quant="Q4_K_M", header_only=True)
    large = replace(BASE, context=262_144, batch=4096, ubatch=4096, flash_attention="off")
    with EngineSession() as child:
        assert sum(compute_sizes(child.dry_run(str(path), large)).values()) > 64 * GIB
        status = Path(f"/proc/{child.pid}/status").read_text()
    peak = re.search(r"VmPeak:\s+(\d+) kB", status)
    assert peak is not None and int(peak.group(1)) * 1024 < 4 * GIB
