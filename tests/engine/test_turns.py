"""A new context on a model that is open, and timed turns on it: what a sweep asks of the engine child."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qnext.engine.crash import EngineCrashError
from qnext.engine.llama.quantize import quantise_rows
from qnext.engine.log_reader import BufferSize, read_buffer_sizes
from qnext.engine.protocol import Message
from qnext.engine.rpc import RpcWorker
from qnext.engine.session import EngineSession
from qnext.models.synth import synthesise
from qnext.plan.values import HOST, Override, Placement

pytestmark = pytest.mark.engine

CPU = Placement(threads=1, threads_batch=1, context=2048)
FAMILIES = ("tiny-qwen3next", "tiny-qwen3moe", "tiny-gpt-oss")
"""Recurrent state beside attention, attention alone, a sliding window: three kinds of state to keep."""


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of random weights: what they say next hangs on every token before."""
    folder = tmp_path_factory.mktemp("tiny")
    paths = {family: folder / f"{family}.gguf" for family in FAMILIES}
    for family, path in paths.items():
        synthesise(family, path, quant="Q4_K_M", quantizer=quantise_rows)
    return paths


@pytest.fixture
def hybrid(tiny_models: dict[str, Path]) -> Iterator[EngineSession]:
    with EngineSession() as session:
        session.open(str(tiny_models["tiny-qwen3next"]), CPU)
        yield session


def words(start: int, count: int) -> list[int]:
    return [(start * 7 + index * 13) % 250 for index in range(count)]


def take_turn(session: EngineSession, depth: int = 300, prompt: int = 40, generate: int = 12) -> Message:
    return session.turn(depth_tokens=words(1, depth), prompt_tokens=words(2, prompt), generate=generate)


def sizes(session: EngineSession, part: str) -> list[BufferSize]:
    return [size for size in read_buffer_sizes(session.size_lines) if size.part == part]


# --- a new context --------------------------------------------------------------------------------------


def test_a_new_context_has_what_was_asked_and_the_log_says_so(hybrid: EngineSession) -> None:
    weights, cache, compute = (sizes(hybrid, part) for part in ("model", "KV", "compute"))
    wanted = replace(CPU, ubatch=64, threads=2, threads_batch=3, kv_type_k="q8_0", kv_type_v="q8_0")
    facts = hybrid.renew(wanted, context=1024)
    named = ("context", "ubatch", "threads", "threads_batch", "flash_attention")
    assert [facts[name] for name in named] == [1024, 64, 2, 3, "on"]
    assert sizes(hybrid, "model") == weights, "the weights are still there"
    assert len(sizes(hybrid, "KV")) == len(cache) and len(sizes(hybrid, "compute")) == len(compute)
    assert sizes(hybrid, "KV")[0].bytes < cache[0].bytes * 0.3, "half the tokens at half the bits"
    assert sizes(hybrid, "compute")[0].bytes < compute[0].bytes
    hybrid.renew(CPU)
    assert [sizes(hybrid, part) for part in ("model", "KV", "compute")] == [weights, cache, compute]


@pytest.mark.parametrize(("asked", "active"), [("on", "on"), ("off", "off"), ("auto", "on")])
def test_whether_flash_attention_is_active_is_told(asked: str, active: str, hybrid: EngineSession) -> None:
    assert hybrid.renew(replace(CPU, flash_attention=asked))["flash_attention"] == active  # type: ignore[arg-type]


def test_opening_tells_model_and_build_for_the_record(tiny_models: dict[str, Path]) -> None:
    with EngineSession() as session:
        facts = session.open(str(tiny_models["tiny-qwen3next"]), CPU)
    assert str(facts["model_desc"]).startswith("qwen3next") and "CPU : " in str(facts["system_info"])


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (replace(CPU, overrides=(Override("exps", HOST),)), "overrides"),
        (replace(CPU, load_mode="mmap"), "load_mode"),
        (replace(CPU, n_gpu_layers=3, extra_buffers=True), "extra_buffers, n_gpu_layers"),
    ],
)
def test_what_takes_a_load_is_refused_and_changes_nothing(
    other: Placement, name: str, hybrid: EngineSession
) -> None:
    before = hybrid.size_lines
    with pytest.raises(EngineCrashError, match=f"loaded with another {name}$") as caught:
        hybrid.renew(other)
    assert caught.value.kind == "refused" and "Open the model again" in caught.value.hint
    assert hybrid.size_lines == before
    assert take_turn(hybrid)["stopped"] is False


def test_a_new_context_takes_an_open_model() -> None:
    with EngineSession() as session, pytest.raises(EngineCrashError, match="no model is open"):
        session.renew(CPU)


def test_a_context_that_cannot_be_had_leaves_the_model_open(hybrid: EngineSession) -> None:
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("the memory of another process can be limited on Linux alone")
    before = take_turn(hybrid)["tokens"]
    _, hard = resource.prlimit(hybrid.pid, resource.RLIMIT_AS)
    resource.prlimit(hybrid.pid, resource.RLIMIT_AS, (1 << 30, hard))
    for _ in range(2):
        with pytest.raises(EngineCrashError, match="could not allocate the context") as caught:
            hybrid.renew(replace(CPU, context=100_000_000))
        assert caught.value.kind == "refused" and "--ctx-size" in caught.value.hint
        assert "fail" in " ".join(caught.value.log_tail)
    assert hybrid.alive
    assert take_turn(hybrid)["tokens"] == before, "the context is made again as it was"
    assert hybrid.renew(replace(CPU, context=1024))["context"] == 1024
    assert take_turn(hybrid)["tokens"] == before


# --- a turn ---------------------------------------------------------------------------------------------


def test_a_turn_has_one_time_for_each_step(hybrid: EngineSession) -> None:
    began = time.perf_counter_ns()
    done = take_turn(hybrid)
    elapsed = time.perf_counter_ns() - began
    steps, prefill, depth = done["token_ns"], done["prefill_ns"], done["depth_ns"]
    assert isinstance(steps, list) and isinstance(prefill, int) and isinstance(depth, int)
    assert len(steps) == 12 and min(steps) > 0 and prefill > 0 and depth > 0
    assert sum(steps) + prefill + depth < elapsed
    assert (done["prompt"], done["stopped"]) == (40, False)
    assert isinstance(done["rss_bytes"], int) and done["rss_bytes"] > 10_000_000
    assert isinstance(done["state_bytes"], int) and 100_000 < done["state_bytes"] < done["rss_bytes"]
    assert isinstance(done["major_faults"], int)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_put_back_is_the_state_that_was_evaluated(family: str, tiny_models: dict[str, Path]) -> None:
    with EngineSession() as session:
        session.open(str(tiny_models[family]), CPU)
        first = take_turn(session)
        again = take_turn(session)
        session.renew(replace(CPU, context=4096))
        renewed = take_turn(session)
        session.open(str(tiny_models[family]), CPU)
        opened = take_turn(session)
        elsewhere = session.turn(depth_tokens=words(5, 300), prompt_tokens=words(2, 40), generate=12)
    assert first["depth_ns"] is not None
    assert [done["depth_ns"] for done in (again, renewed, opened)] == [None] * 3
    assert all(done["tokens"] == first["tokens"] for done in (again, renewed, opened))
    assert elsewhere["depth_ns"] is not None and elsewhere["tokens"] != first["tokens"]


def test_a_state_that_lay_on_a_device_is_put_back_there(tiny_models: dict[str, Path]) -> None:
    with RpcWorker() as worker, EngineSession() as session:
        session.describe((worker.endpoint,))
        device = replace(CPU, devices=("RPC0",), rpc_servers=(worker.endpoint,), n_gpu_layers=999)
        session.open(str(tiny_models["tiny-qwen3next"]), device)
        first = take_turn(session)
        session.renew(replace(device, ubatch=512, context=4096))
        again = take_turn(session)
        assert sizes(session, "KV")[0].buffer.startswith("RPC0")
        stopped = session.turn(depth_tokens=[], prompt_tokens=words(2, 40), generate=1900, limit_s=0.2)
    assert first["depth_ns"] is not None and again["depth_ns"] is None
    assert again["tokens"] == first["tokens"]
    assert stopped["stopped"] is True


def test_a_cache_of_another_type_takes_the_depth_anew(hybrid: EngineSession) -> None:
    def evaluated(placement: Placement) -> bool:
        hybrid.renew(placement)
        return take_turn(hybrid)["depth_ns"] is not None

    small = replace(CPU, kv_type_k="q8_0", kv_type_v="q8_0")
    assert [evaluated(placement) for placement in (CPU, small, CPU, small)] == [True, True, False, False]
    assert evaluated(replace(CPU, flash_attention="off"))
    assert "error loading state" not in " ".join(hybrid.log)


def test_the_two_latest_depths_are_kept(hybrid: EngineSession) -> None:
    depths = [take_turn(hybrid, depth=depth)["depth_ns"] for depth in (300, 310, 300, 320, 300, 310)]
    assert [ns is not None for ns in depths] == [True, True, False, True, False, True]


def test_a_depth_of_another_model_is_not_put_back(tiny_models: dict[str, Path]) -> None:
    with EngineSession() as session:
        for family in (*FAMILIES, FAMILIES[0]):
            session.open(str(tiny_models[family]), CPU)
            assert take_turn(session)["depth_ns"] is not None


def test_sampling_with_a_seed_is_the_same_every_time(hybrid: EngineSession) -> None:
    def said(sampling: dict[str, float] | None) -> object:
        return hybrid.turn(depth_tokens=[], prompt_tokens=words(2, 40), generate=20, sampling=sampling)[
            "tokens"
        ]

    chosen = said({"temperature": 5.0, "seed": 4})
    assert chosen == said({"temperature": 5.0, "seed": 4})
    assert chosen != said(None)


def test_an_answer_that_would_end_goes_on(demo_model: Path) -> None:
    with EngineSession() as session:
        session.open(str(demo_model), CPU)
        question = session.tokenize("<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n")
        done = session.turn(depth_tokens=[], prompt_tokens=question, generate=100)
    assert isinstance(done["token_ns"], list) and len(done["token_ns"]) == 100


def test_a_turn_leaves_an_empty_context(demo_model: Path) -> None:
    with EngineSession() as session:
        session.open(str(demo_model), CPU)
        text = "What can you do? "
        for _ in range(2):
            *_, done = session.generate(text, max_tokens=2, sampling={})
            assert done["cached_tokens"] == 0
            session.turn(depth_tokens=[], prompt_tokens=session.tokenize(text), generate=1)


def test_a_turn_without_a_prompt_or_without_room_is_refused(hybrid: EngineSession) -> None:
    hybrid.renew(CPU, context=512)
    for prompt, generate, reason in ((0, 4, "empty"), (200, 13, "513 tokens long, the context 512")):
        with pytest.raises(EngineCrashError, match=reason) as caught:
            take_turn(hybrid, prompt=prompt, generate=generate)
        assert caught.value.kind == "refused"
    assert take_turn(hybrid, prompt=200, generate=12)["prompt"] == 200, "the last token has room"


# --- turns that do not come to their end ----------------------------------------------------------------


def test_a_turn_stops_at_its_limit_with_what_was_timed(demo_model: Path) -> None:
    with EngineSession() as session:
        session.open(str(demo_model), replace(CPU, context=32_768, batch=64))
        long, short = words(3, 16_000), words(3, 40)
        started = time.monotonic()
        prefill = session.turn(depth_tokens=[], prompt_tokens=long, generate=9, limit_s=0.4)
        decode = session.turn(depth_tokens=[], prompt_tokens=short, generate=30_000, limit_s=0.4)
        depth = session.turn(depth_tokens=long, prompt_tokens=short, generate=9, depth_limit_s=0.4)
        assert time.monotonic() - started < 8
        for done in (prefill, decode, depth):
            assert done["stopped"] is True
        assert int(str(prefill["prompt"])) % 64 == 0 and 0 < int(str(prefill["prompt"])) < 16_000
        assert 0.3e9 < int(str(prefill["prefill_ns"])) < 2e9 and prefill["token_ns"] == []
        assert decode["prompt"] == 40 and isinstance(decode["token_ns"], list)
        assert 0 < len(decode["token_ns"]) < 30_000 and sum(decode["token_ns"]) < 2e9
        assert (depth["depth_ns"], depth["prefill_ns"], depth["prompt"]) == (None, None, 0)
        after = session.turn(depth_tokens=short, prompt_tokens=short, generate=9, limit_s=60)
        assert after["stopped"] is False and len(after["tokens"]) == 9  # type: ignore[arg-type]


def test_ctrl_c_stops_a_turn_at_once_and_leaves_the_session_usable(demo_model: Path) -> None:
    with EngineSession() as session:
        session.open(str(demo_model), replace(CPU, context=32_768))
        interrupt = threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT))
        interrupt.start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            session.turn(depth_tokens=[], prompt_tokens=words(3, 40), generate=30_000, limit_s=60)
        assert time.monotonic() - started < 1.4
        interrupt.join()
        assert session.alive
        assert take_turn(session)["stopped"] is False


def test_a_child_killed_in_a_turn_is_explained(demo_model: Path) -> None:
    with EngineSession() as session:
        session.open(str(demo_model), replace(CPU, context=32_768))
        killer = threading.Timer(0.3, os.kill, (session.pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(EngineCrashError, match=r"killed from outside .* while timing a turn") as caught:
            session.turn(depth_tokens=[], prompt_tokens=words(3, 40), generate=30_000)
        killer.join()
    assert caught.value.kind == "killed"
