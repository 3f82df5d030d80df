"""The real llama-server by our ruler and by its own: the same tokens, the same speeds.

Uses a llama-server that is here already (built by scripts/peers); without one these tests skip.
"""

from __future__ import annotations

import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

from qnext.bench.endpoint_result import result_warnings
from qnext.config import find_paths
from qnext.engine.fit import find_fit_program
from qnext.engine.rpc import free_port
from qnext.errors import EngineError
from qnext.pipeline.endpoint import EndpointWatch, measure_endpoint
from qnext.pipeline.endpoint_load import EndpointTask
from qnext.pipeline.endpoint_pair import PairTask, PairWatch, measure_pair

pytestmark = pytest.mark.engine

START_LIMIT_S = 60


@pytest.fixture(scope="module")
def served(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a llama-server with the demo and two slots."""
    try:
        program = find_fit_program(find_paths({}).cache_dir).with_name("llama-server")
    except EngineError as error:
        pytest.skip(f"{error.message}: {error.hint}")
    if not program.is_file():
        pytest.skip(f"there is no {program}: run scripts/peers")
    port = free_port()
    argv = [str(program), "-m", str(demo_model), "-t", "1", "-tb", "1", "-c", "2048", "-np", "2"]
    argv += ["--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path_factory.mktemp("endpoint") / "server.log"
    with log.open("w") as out, subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT) as process:
        try:
            deadline = time.monotonic() + START_LIMIT_S
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                    break
                except (urllib.error.URLError, OSError):
                    assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()


@pytest.mark.thorough
def test_figures_agree_with_the_servers_own_timings(served: str) -> None:
    task = EndpointTask(served, concurrency=(1, 2), prompt=256, generate=32, repetitions=3)
    found = measure_endpoint(task, EndpointWatch())
    assert found.status == "ok" and result_warnings(found) == ()
    assert found.server.software == "llama.cpp" and found.server.extras and found.server.usage
    assert (found.prompt_source, found.output_source) == ("usage", "usage")
    one, two = found.levels
    assert (len(one.exchanges), len(two.exchanges)) == (3, 6)
    for exchange in (*one.exchanges, *two.exchanges):
        timings = exchange.server_timings
        assert exchange.prompt_tokens == timings["prompt_n"] and timings["cache_n"] == 0
        assert exchange.output_tokens == timings["predicted_n"] == 32
        assert exchange.prompt_tokens is not None and abs(exchange.prompt_tokens - 256) <= 5
    own_prefill = median(exchange.server_timings["prompt_per_second"] for exchange in one.exchanges)
    own_decode = median(exchange.server_timings["predicted_per_second"] for exchange in one.exchanges)
    # Wide, for a busy machine: what the ratios are on a quiet one is no matter for a test.
    assert one.prefill_tps and one.prefill_tps.median / own_prefill == pytest.approx(1, abs=0.3)
    assert one.decode_tps and one.decode_tps.median / own_decode == pytest.approx(1, abs=0.2)


@pytest.mark.thorough
def test_one_server_against_itself_has_pairs_of_equal_prompts_and_no_cache_hit(served: str) -> None:
    task = EndpointTask(served, concurrency=(2,), prompt=128, generate=8, repetitions=2)
    found = measure_pair(PairTask(task, served), PairWatch())
    (level,) = found.levels
    assert (found.status, level.status, len(level.pairs)) == ("ok", "ok", 2)
    for done in level.rounds:
        seen = [one for side in done.sides for one in side]
        assert all(one.prompt_tokens and abs(one.prompt_tokens - 128) <= 3 for one in seen)
        assert {one.cached_tokens for one in seen} == {0}
    assert set(level.comparisons) == {"ttft", "gap", "per_token", "output_tps"}


def test_a_prompt_beyond_the_context_is_refused_with_the_servers_words(served: str) -> None:
    with pytest.raises(EngineError, match=r"HTTP 400.*context") as caught:
        measure_endpoint(EndpointTask(served, prompt=4000), EndpointWatch())
    assert "larger context" in caught.value.hint
