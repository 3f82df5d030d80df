"""One engine child and what it does when all goes well: placements, text, conversations, cancelling."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from qnext.engine.crash import EngineCrashError
from qnext.engine.protocol import Message, frame, read_message, write_frame
from qnext.engine.session import EngineSession
from qnext.errors import UsageError
from qnext.models.gguf_reader import read_header
from qnext.models.synth import DEMO_SENTENCE
from qnext.plan.overrides import repack_overrides
from qnext.plan.traits import host_traits
from qnext.plan.values import HOST, Override, Placement

pytestmark = pytest.mark.engine

CPU = Placement(threads=1, threads_batch=1, context=2048)
QUESTION = "<|im_start|>user\nWhat can you do?<|im_end|>\n<|im_start|>assistant\n"
LONG_QUESTION = "<|im_start|>user\n" + "What can you do for me? " * 40 + "<|im_end|>\n<|im_start|>assistant\n"


def text_of(events: Iterator[Message]) -> str:
    return "".join(str(event.get("text", "")) for event in events if event["event"] == "token")


def greedy(session: EngineSession, text: str = QUESTION, max_tokens: int = 60) -> str:
    return text_of(session.generate(text, max_tokens=max_tokens, sampling={}))


@pytest.fixture(scope="module")
def opened(demo_model: Path) -> Iterator[EngineSession]:
    """A session with the demo open on the CPU; tests leave it usable."""
    with EngineSession() as session:
        session.open(str(demo_model), CPU)
        yield session


def repacked_experts(model: Path) -> tuple[Override, ...]:
    from qnext.hardware import detect_machine

    features = detect_machine(model.parent).cpu.instruction_sets or ()
    return repack_overrides(read_header(model), host_traits(features))


PLACEMENTS = {
    "plain": CPU,
    "override to CPU": replace(CPU, overrides=(Override("exps", HOST),)),
    "q8_0 cache": replace(CPU, kv_type_k="q8_0", kv_type_v="q8_0"),
    "no flash attention": replace(CPU, flash_attention="off"),
    "mapped file": replace(CPU, load_mode="mmap"),
    "four sequences": replace(CPU, context=8192, parallel=4),
    "small batches": replace(CPU, batch=64, ubatch=32),
}


@pytest.mark.parametrize("name", PLACEMENTS)
def test_every_placement_on_the_cpu_says_the_same(name: str, demo_model: Path) -> None:
    with EngineSession() as session:
        session.open(str(demo_model), PLACEMENTS[name])
        assert greedy(session) == DEMO_SENTENCE


def test_experts_in_cpu_repack_say_the_same_and_really_are_there(demo_model: Path) -> None:
    overrides = repacked_experts(demo_model)
    if not overrides:
        pytest.skip("this CPU has no repacked layout for Q4_K experts")
    with EngineSession() as session:
        session.open(str(demo_model), replace(CPU, overrides=overrides))
        assert any("CPU_REPACK model buffer size" in line for line in session.log)
        assert greedy(session) == DEMO_SENTENCE


def test_an_override_to_pinned_host_memory_is_honoured(demo_model: Path) -> None:
    with EngineSession() as session:
        devices = session.describe()["devices"]
        assert isinstance(devices, list)
        pinned = [device for device in devices if device["host_buffer_type"]]
        if not pinned:
            pytest.skip("no device here offers a pinned host buffer type (it takes a GPU)")
        device, buffer = str(pinned[0]["name"]), str(pinned[0]["host_buffer_type"])
        placement = replace(CPU, devices=(device,), n_gpu_layers=999, overrides=(Override("exps", buffer),))
        session.open(str(demo_model), placement)
        assert any(f"{buffer} model buffer size" in line for line in session.log)
        assert greedy(session) == DEMO_SENTENCE


def test_an_unknown_buffer_or_device_is_named(demo_model: Path) -> None:
    with EngineSession() as session:
        for wrong in (replace(CPU, overrides=(Override("x", "CUDA7"),)), replace(CPU, devices=("CUDA7",))):
            with pytest.raises(EngineCrashError, match="CUDA7") as caught:
                session.open(str(demo_model), wrong)
            assert caught.value.kind == "refused" and "-ot" in caught.value.hint
        session.open(str(demo_model), CPU)
        assert greedy(session) == DEMO_SENTENCE


def test_a_broken_override_pattern_is_explained_and_the_session_lives_on(demo_model: Path) -> None:
    with EngineSession() as session:
        with pytest.raises(EngineCrashError, match="could not load") as caught:
            session.open(str(demo_model), replace(CPU, overrides=(Override("(", HOST),)))
        assert "regular expression" in " ".join(caught.value.log_tail)
        session.open(str(demo_model), CPU)
        assert greedy(session) == DEMO_SENTENCE


def test_paths_may_hold_spaces_umlauts_and_bytes_that_are_no_utf8(demo_model: Path, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/gr\xc3\xbcn und \xff kaputt.gguf"
    try:
        shutil.copyfile(demo_model, path)
    except OSError as error:
        pytest.skip(f"this file system refuses such a name: {error}")
    with EngineSession() as session:
        session.open(os.fsdecode(path), CPU)
        assert greedy(session, max_tokens=3)


# --- generating -----------------------------------------------------------------------------------------


def test_counts_describe_the_generation(opened: EngineSession) -> None:
    *events, done = opened.generate(QUESTION, max_tokens=60, sampling={})
    words = [event for event in events if event["event"] == "token"]
    assert done["stop_reason"] == "eos"
    assert done["generated"] == len(words) + 1, "the end-of-turn token is generated but not shown"
    assert done["decodes"] == len(words), "the first token comes out of the prefill"


def test_one_token_needs_no_decode(opened: EngineSession) -> None:
    *events, done = opened.generate(QUESTION, max_tokens=1, sampling={})
    assert text_of(iter(events)) == "Hello"
    assert (done["generated"], done["decodes"], done["stop_reason"]) == (1, 0, "length")


def test_a_stop_string_ends_the_answer_and_is_not_shown(opened: EngineSession) -> None:
    *events, done = opened.generate(QUESTION, max_tokens=60, sampling={}, stop=["built-in", "never"])
    assert text_of(iter(events)) == DEMO_SENTENCE.split("built-in")[0]
    assert done["stop_reason"] == "stop"


def test_an_empty_prompt_and_one_longer_than_the_context_are_refused(opened: EngineSession) -> None:
    for text, words in (("", "empty"), ("why? " * 3000, "the context 2048")):
        with pytest.raises(EngineCrashError, match=words) as caught:
            list(opened.generate(text, max_tokens=1, sampling={}))
        assert caught.value.kind == "refused"
    assert greedy(opened) == DEMO_SENTENCE


def test_the_context_is_used_to_its_last_token(demo_model: Path) -> None:
    with EngineSession() as session:
        size = int(str(session.open(str(demo_model), replace(CPU, context=256))["context_per_sequence"]))
        one = len(session.tokenize(" the"))
        fill = " the" * ((size - 10) // one)
        count = len(session.tokenize(fill))
        *_, done = session.generate(fill, max_tokens=100, sampling={}, ignore_eos=True)
        assert done["stop_reason"] == "context"
        assert done["generated"] == size - count + 1, "the last token is sampled without being evaluated"
        full = " the" * (size // one)
        *_, done = session.generate(full, max_tokens=100, sampling={}, ignore_eos=True)
        assert (done["prompt_tokens"], done["generated"], done["stop_reason"]) == (size, 1, "context")


def test_a_turn_that_continues_the_conversation_evaluates_only_what_is_new(opened: EngineSession) -> None:
    *first, done = opened.generate(QUESTION, max_tokens=60, sampling={})
    second = QUESTION + text_of(iter(first)) + "<|im_end|>\n" + QUESTION
    *events, again = opened.generate(second, max_tokens=60, sampling={})
    assert text_of(iter(events)) == DEMO_SENTENCE
    assert again["cached_tokens"] == int(str(done["prompt_tokens"])) + int(str(done["decodes"]))


def test_a_hybrid_model_goes_back_to_the_end_of_its_last_prompts(opened: EngineSession) -> None:
    """Recurrent state cannot be cut: without the copies every one of these would start from nothing."""
    greedy(opened, "why?")
    *_, first = opened.generate(LONG_QUESTION, max_tokens=60, sampling={})
    count = int(str(first["prompt_tokens"]))
    assert first["cached_tokens"] == 0
    *events, again = opened.generate(LONG_QUESTION, max_tokens=60, sampling={})
    assert text_of(iter(events)) == DEMO_SENTENCE
    assert again["cached_tokens"] == count - 4, "the same question again"
    answered = LONG_QUESTION + "Hello<|im_end|>\n"
    greedy(opened, answered + LONG_QUESTION)
    *events, third = opened.generate(answered + QUESTION, max_tokens=60, sampling={})
    assert text_of(iter(events)) == DEMO_SENTENCE
    assert third["cached_tokens"] == count - 4, "the second question taken back"
    *events, other = opened.generate("Hi! " + LONG_QUESTION, max_tokens=60, sampling={})
    assert text_of(iter(events)) == DEMO_SENTENCE
    assert other["cached_tokens"] == 0, "nothing in common"


_COMPARE_LOGITS = """
import json, sys
from qnext.engine.llama import binding
from qnext.engine.llama.runtime import Runtime
model, placement, text = json.loads(sys.argv[1])
runtime = Runtime(lambda *event, **fields: None)
facts = runtime.open(model, placement)
def last_logits(text):
    counts = runtime.generate(text, max_tokens=1, sampling={})
    values = binding.llama().llama_get_logits_ith(runtime._context.handle, -1)
    return counts["cached_tokens"], values[: facts["vocabulary"]]
afresh = last_logits(text)
runtime.generate(text, max_tokens=30, sampling={}, ignore_eos=True)
again = last_logits(text)
print(json.dumps([afresh[0], again[0], afresh[1] == again[1]]))
"""


def test_going_back_gives_the_very_logits_of_starting_afresh(demo_model: Path) -> None:
    """The demo's words hardly depend on its state, so the numbers behind them are compared."""
    arguments = json.dumps([str(demo_model), asdict(CPU), LONG_QUESTION])
    result = subprocess.run(
        [sys.executable, "-c", _COMPARE_LOGITS, arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    cached_afresh, cached_again, same = json.loads(result.stdout)
    assert cached_afresh == 0 and cached_again > 256
    assert same


def test_a_cancelled_answer_stops_at_once_and_leaves_the_session_usable(opened: EngineSession) -> None:
    answer = opened.generate(QUESTION, max_tokens=2000, sampling={}, ignore_eos=True)
    for event in answer:
        if event["event"] == "token":
            break
    started = time.monotonic()
    answer.close()
    assert time.monotonic() - started < 1 and opened.alive
    assert greedy(opened) == DEMO_SENTENCE


def test_a_long_prefill_is_cancelled_within_a_second(demo_model: Path) -> None:
    with EngineSession() as session:
        session.open(str(demo_model), replace(CPU, context=32768, batch=256))
        answer = session.generate("What can you do for me? " * 4000, max_tokens=1, sampling={})
        assert next(answer)["event"] == "prefill"
        started = time.monotonic()
        answer.close()
        assert time.monotonic() - started < 1
        assert session.alive
        assert greedy(session) == DEMO_SENTENCE


def test_a_cancel_sent_together_with_its_request_is_not_lost(demo_model: Path) -> None:
    """The worker's reading thread may see both before its working thread has begun."""
    command = [sys.executable, "-m", "qnext.engine.llama.worker"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes) as worker:
        assert worker.stdin is not None and worker.stdout is not None

        def last_event(*requests: Message) -> object:
            write_frame(worker.stdin, b"".join(frame(request) for request in requests))
            while (message := read_message(worker.stdout)) is not None:
                if message["event"] in ("done", "failed", "cancelled"):
                    return message["event"]
            return "died"

        answer: Message = {"op": "generate", "text": QUESTION, "max_tokens": 1900, "sampling": {}}
        answer["ignore_eos"] = True
        assert last_event({"op": "open", "model": str(demo_model), "placement": asdict(CPU)}) == "done"
        for _ in range(10):
            assert last_event(answer, {"op": "cancel"}) == "cancelled"
        worker.stdin.close()
        assert worker.wait(timeout=5) == 0, "it ends with its parent's end of the pipe"


def test_two_requests_at_once_are_a_mistake_that_is_told(opened: EngineSession) -> None:
    answer = opened.generate(QUESTION, max_tokens=5, sampling={})
    next(answer)
    with pytest.raises(RuntimeError, match="neither read"):
        opened.tokenize("x")
    answer.close()
    assert opened.tokenize("x")


def test_a_benchmark_gives_raw_samples_and_generating_works_after_it(opened: EngineSession) -> None:
    *samples, done = opened.bench(prompt=32, generate=2, depth=16, repetitions=3)
    assert [event["ns"] for event in samples if event["event"] == "sample"] == done["samples_ns"]
    assert len(samples) == 3
    assert greedy(opened) == DEMO_SENTENCE


def test_a_message_larger_than_a_pipe_arrives(opened: EngineSession) -> None:
    assert len(opened.tokenize("why, how? " * 100_000)) > 100_000


# --- the child ------------------------------------------------------------------------------------------


def test_the_engine_gets_what_is_set_for_it_but_no_llama_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "77")
    monkeypatch.setenv("GGML_OP_OFFLOAD_MIN_BATCH", "48")
    monkeypatch.setenv("QNEXT_SEEN", "yes")
    with EngineSession(environment={"GGML_OP_OFFLOAD_MIN_BATCH": "64"}) as session:
        environ = Path(f"/proc/{session.pid}/environ")
        if not environ.exists():
            pytest.skip("/proc is needed to look into another process")
        entries = environ.read_bytes().decode().split("\0")
    assert not [entry for entry in entries if entry.startswith("LLAMA_ARG")]
    assert {"QNEXT_SEEN=yes", "GGML_OP_OFFLOAD_MIN_BATCH=64"} <= set(entries)


def test_modules_in_the_current_folder_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit('wrong module')")
    monkeypatch.chdir(tmp_path)
    with EngineSession() as session:
        assert session.alive


def test_sessions_leave_no_open_files_threads_or_processes(demo_model: Path) -> None:
    import threading

    import psutil

    def held() -> tuple[int, int, int]:
        me = psutil.Process()
        return me.num_fds(), threading.active_count(), len(me.children(recursive=True))

    before = held()
    for index in range(6):
        with EngineSession() as session:
            if index % 3 == 0:
                session.open(str(demo_model), CPU)
            elif index % 3 == 1:
                session.kill()
    assert held() == before


@pytest.mark.parametrize("value", ["soon", "-1", "0", "nan", "inf"])
def test_a_time_limit_that_is_no_number_is_explained(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QNEXT_ENGINE_TIMEOUT", value)
    with pytest.raises(UsageError, match="QNEXT_ENGINE_TIMEOUT"):
        EngineSession()


_LOOK_AT_STRUCTS = """
import ctypes, json
from qnext.engine.llama import binding, params
lib = binding.llama()
def fields(struct):
    names = [name for name, kind in struct._fields_ if kind in (
        ctypes.c_bool, ctypes.c_int, ctypes.c_int32, ctypes.c_uint32, ctypes.c_float, ctypes.c_size_t)]
    return {name: getattr(struct, name) for name in names}
base = binding._library("ggml-base")
base.ggml_threadpool_params_default.restype = binding._ThreadpoolParams
pool = base.ggml_threadpool_params_default(3)
print(json.dumps({
    "model": fields(lib.llama_model_default_params()),
    "context": fields(lib.llama_context_default_params()),
    "pool": [pool.n_threads, pool.prio, pool.poll, pool.strict_cpu, pool.paused, any(pool.cpumask)],
}))
"""


def test_struct_layouts_are_those_of_the_pinned_release() -> None:
    """A field that moved would show a neighbour's default (llama-model.cpp, llama-context.cpp, ggml.c)."""
    result = subprocess.run([sys.executable, "-c", _LOOK_AT_STRUCTS], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout)
    assert seen["model"] == {
        "n_gpu_layers": -1,
        "split_mode": 1,
        "load_mode": -1,
        "lazy_mode": seen["model"]["lazy_mode"],
        "main_gpu": 0,
        "vocab_only": False,
        "check_tensors": False,
        "use_extra_bufts": True,
        "no_host": False,
        "no_alloc": False,
        "load_mtp": False,
    }
    context = seen["context"]
    expected = {
        "n_ctx": 512,
        "n_batch": 2048,
        "n_ubatch": 512,
        "n_seq_max": 1,
        "n_rs_seq": 0,
        "n_outputs_max": 0,
        "n_outputs_max_per_seq": 1,
        "n_threads": 4,
        "n_threads_batch": 4,
        "ctx_type": 0,
        "rope_scaling_type": -1,
        "pooling_type": -1,
        "attention_type": -1,
        "flash_attn_type": -1,
        "rope_freq_base": 0.0,
        "yarn_ext_factor": -1.0,
        "yarn_orig_ctx": 0,
        "type_k": 1,
        "type_v": 1,
        "embeddings": False,
        "offload_kqv": True,
        "no_perf": True,
        "op_offload": True,
        "swa_full": True,
        "kv_unified": False,
        "n_samplers": 0,
    }
    assert {name: context[name] for name in expected} == expected
    assert seen["pool"] == [3, 0, 50, False, False, False]


def test_starting_and_opening_the_demo_take_a_moment(demo_model: Path) -> None:
    """Not a benchmark: this catches an import or a probe that slipped into the start (usual: 0.2 s)."""
    started = time.monotonic()
    with EngineSession() as session:
        session.open(str(demo_model), CPU)
    assert time.monotonic() - started < 5
