"""Packed plans on two loopback devices: the engine lays them out as planned, scattered layers and all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest

from qnext.config import find_paths
from qnext.engine.build import require_build
from qnext.engine.dry_run import DryRunner
from qnext.engine.rpc import RpcWorker
from qnext.engine.session import EngineSession
from qnext.models.gguf_reader import read_header
from qnext.models.header import ModelHeader
from qnext.models.synth import synthesise
from qnext.plan.layer_prices import NO_PIPELINE
from qnext.units import MIB
from tests.engine.test_rpc_plans import ask, assert_allocated_as_planned, settle
from tests.planning import SPEEDS

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> ModelHeader:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    synthesise("tiny-qwen3next", path, quant="Q4_K_M", header_only=True)
    return read_header(path)


@pytest.fixture(scope="module")
def workers() -> Iterator[tuple[str, str]]:
    with RpcWorker() as one, RpcWorker() as two:
        yield one.endpoint, two.endpoint


@pytest.mark.parametrize(
    ("sizes", "in_ram"), [((12, 11), range(1, 8)), ((14, 9), range(1, 8)), ((16, 16), range(1))]
)
def test_a_packed_placement_is_allocated_as_planned(
    sizes: tuple[int, int], in_ram: range, mixture: ModelHeader, workers: tuple[str, str]
) -> None:
    given = (sizes[0] * MIB, sizes[1] * MIB)
    wishes = {"kv_type_k": "f16", "kv_type_v": "f16", "parallel": 1}
    problem = replace(ask(mixture, workers, given, **wishes), speeds=SPEEDS)
    with closing(DryRunner(mixture, require_build(), find_paths().headers_dir)) as runner:
        placed = settle(problem, runner)
    assert placed.fits
    assert len(placed.placement.cpu_expert_layers) in in_ram
    if not placed.placement.cpu_expert_layers:  # all there is room for, but not for a pipeline's copies
        assert placed.placement.overrides == (NO_PIPELINE,)
    with EngineSession(silence_limit_s=30) as session:
        session.open(str(mixture.paths[0]), placed.placement)
        assert_allocated_as_planned(problem, placed, session.log)
