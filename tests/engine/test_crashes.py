"""Real ways for the engine to die. Each becomes one explained error, no process stays, and life goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from qnext.engine.crash import EngineCrashError
from qnext.engine.session import EngineSession
from qnext.models.synth import DEMO_SENTENCE
from qnext.plan.values import CPU_REPACK, Override, Placement
from tests.engine_processes import memory_cgroup

pytestmark = pytest.mark.engine

CPU = Placement(threads=1, threads_batch=1, context=2048)
QUESTION = "<|im_start|>user\nWhat can you do?<|im_end|>\n<|im_start|>assistant\n"


def say_the_sentence(session: EngineSession) -> str:
    events = session.generate(QUESTION, max_tokens=60, sampling={})
    return "".join(str(event["text"]) for event in events if event["event"] == "token")


@pytest.fixture(autouse=True)
def life_goes_on(demo_model: Path) -> Iterator[None]:
    """After each crash: no process of ours is left, and a new session says the sentence."""
    before = psutil.Process().children(recursive=True)
    yield
    assert psutil.Process().children(recursive=True) == before
    with EngineSession() as session:
        session.open(str(demo_model), CPU)
        assert say_the_sentence(session) == DEMO_SENTENCE


def crash_while_generating(model: Path, signal_number: int) -> EngineCrashError:
    with EngineSession() as session:
        session.open(str(model), CPU)
        answer = session.generate(QUESTION, max_tokens=1900, sampling={}, ignore_eos=True)
        next(answer)
        os.kill(session.pid, signal_number)
        with pytest.raises(EngineCrashError) as caught:
            for _ in answer:
                pass
        with pytest.raises(EngineCrashError) as second:
            session.tokenize("x")
        assert second.value.kind == caught.value.kind, "asking again tells the same, at once"
    return caught.value


@pytest.mark.parametrize(
    ("signal_number", "kind", "words"),
    [
        (signal.SIGSEGV, "crash", "crashed (SIGSEGV)"),
        (signal.SIGABRT, "abort", "failed check (SIGABRT)"),
        (signal.SIGILL, "illegal", "instruction this CPU does not have"),
        (signal.SIGKILL, "killed", "killed from outside"),
        (signal.SIGTERM, "killed", "ended the engine from outside (SIGTERM)"),
        (signal.SIGBUS, "crash", "could not read memory"),
    ],
)
def test_a_signal_is_explained(demo_model: Path, signal_number: int, kind: str, words: str) -> None:
    error = crash_while_generating(demo_model, signal_number)
    assert error.exit_code == 7
    assert (error.kind, words in error.message) == (kind, True), error.message
    assert error.message.endswith("while generating")
    assert error.hint and error.log_tail


def test_tensors_that_cannot_be_repacked_crash_the_loader_for_real(demo_model: Path) -> None:
    """llama.cpp has no check there: the stand-in, on any CPU, for the AMX crash of some."""
    with EngineSession() as session:
        with pytest.raises(EngineCrashError) as caught:
            session.open(str(demo_model), replace(CPU, overrides=(Override(r"weight$", CPU_REPACK),)))
            say_the_sentence(session)
        assert not session.alive
    assert caught.value.kind in ("crash", "abort"), caught.value.message
    assert "loading the model" in caught.value.message
    assert "-ot" in caught.value.hint
    assert any("repack" in line.lower() for line in caught.value.log_tail)


def test_letting_the_engine_repack_works_or_is_explained(demo_model: Path) -> None:
    """The real thing where the CPU has AMX: right words, or one of two explanations."""
    with EngineSession() as session:
        try:
            session.open(str(demo_model), replace(CPU, extra_buffers=True))
            text = say_the_sentence(session)
        except EngineCrashError as error:
            assert "amx_int8" in cpu_flags(), f"without AMX this must work: {error.message}"
            assert error.kind in ("amx", "crash")
            assert error.kind != "amx" or "--repack experts" in error.hint
        else:
            assert text == DEMO_SENTENCE
        if not any("AMX model buffer size" in line for line in session.log):
            pytest.skip("no AMX buffer type here: only the ordinary repack was tried, and it works")


def cpu_flags() -> set[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.split())
    return set()


def test_an_abort_of_the_engine_itself_names_its_check(demo_model: Path) -> None:
    """More sequences than llama.cpp can count are refused with GGML_ASSERT or a message, never silently."""
    with EngineSession() as session, pytest.raises(EngineCrashError) as caught:
        session.open(str(demo_model), replace(CPU, devices=(), parallel=100_000))
    assert caught.value.kind in ("abort", "refused")
    assert caught.value.log_tail


def test_a_hang_is_ended_after_the_silence_limit(demo_model: Path) -> None:
    with EngineSession(silence_limit_s=1.5) as session:
        session.open(str(demo_model), CPU)
        answer = session.generate(QUESTION, max_tokens=1900, sampling={}, ignore_eos=True)
        next(answer)
        os.kill(session.pid, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(EngineCrashError, match=r"no sign of life for 1\.5 s while generating") as caught:
            for _ in answer:
                pass
        assert time.monotonic() - started < 4
        assert not session.alive
    assert caught.value.kind == "hang" and "QNEXT_ENGINE_TIMEOUT" in caught.value.hint


def test_a_benchmark_may_be_silent_for_as_long_as_a_large_batch_takes(demo_model: Path) -> None:
    with EngineSession(silence_limit_s=1) as session:
        session.open(str(demo_model), replace(CPU, batch=1500, ubatch=1500))
        samples = session.bench(prompt=16, generate=0, depth=0, repetitions=500)
        next(samples)
        os.kill(session.pid, signal.SIGSTOP)
        with pytest.raises(EngineCrashError, match=r"no sign of life for 2\.5 s while benchmarking"):
            for _ in samples:
                pass


def test_a_child_that_reads_nothing_does_not_block_a_large_request(demo_model: Path) -> None:
    with EngineSession(silence_limit_s=1.5) as session:
        session.open(str(demo_model), CPU)
        os.kill(session.pid, signal.SIGSTOP)
        with pytest.raises(EngineCrashError, match="no sign of life"):
            session.tokenize("why? " * 200_000)


def test_a_child_that_ignores_a_cancel_is_ended_within_a_second(demo_model: Path) -> None:
    with EngineSession() as session:
        session.open(str(demo_model), CPU)
        answer = session.generate(QUESTION, max_tokens=1900, sampling={}, ignore_eos=True)
        next(answer)
        os.kill(session.pid, signal.SIGSTOP)
        started = time.monotonic()
        answer.close()
        assert time.monotonic() - started < 1
        assert not session.alive
        with pytest.raises(EngineCrashError, match="did not stop when asked") as caught:
            session.tokenize("x")
    assert caught.value.kind == "ended"


def test_a_child_that_floods_its_log_fills_neither_pipe_nor_memory(demo_model: Path) -> None:
    """2 MB of log, without line ends and then with them, through the child's own standard error."""
    with EngineSession() as session:
        session.open(str(demo_model), CPU)
        with Path(f"/proc/{session.pid}/fd/2").open("wb", buffering=0) as log:
            log.write(b"x" * 1_000_000)
            log.write(b"\n" + b"line\n" * 200_000)
        assert say_the_sentence(session) == DEMO_SENTENCE
        assert len(session.log) <= 2000
        assert max(len(line) for line in session.log) <= 4096


def test_the_out_of_memory_killer_is_explained(demo_model: Path) -> None:
    """The cache of 524,288 tokens is 512 MiB that llama.cpp fills with zeros; 150 MiB are allowed."""
    with contextlib.ExitStack() as group, EngineSession() as session:
        try:
            procs = group.enter_context(memory_cgroup(150 << 20))
            procs.write_text(str(session.pid))
        except OSError as error:
            pytest.skip(f"a cgroup with a memory limit cannot be used here: {error}")
        with pytest.raises(EngineCrashError, match="killed from outside") as caught:
            session.open(str(demo_model), replace(CPU, context=524_288))
        assert caught.value.kind == "killed"
        assert "--ctx-size" in caught.value.hint and "loading the model" in caught.value.message
