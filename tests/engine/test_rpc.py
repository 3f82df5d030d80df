"""A second device without a second card: llama.cpp's RPC worker on loopback, and what if it goes away."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qnext.engine.crash import EngineCrashError
from qnext.engine.log_reader import read_buffer_sizes
from qnext.engine.rpc import LOOPBACK, RpcWorker, free_port
from qnext.engine.session import EngineSession
from qnext.errors import EngineError, UsageError
from qnext.models.synth import DEMO_SENTENCE
from qnext.plan.values import HOST, Override, Placement

pytestmark = pytest.mark.engine

CPU = Placement(threads=1, threads_batch=1, context=2048)
QUESTION = "<|im_start|>user\nWhat can you do?<|im_end|>\n<|im_start|>assistant\n"


def say_the_sentence(session: EngineSession) -> str:
    events = session.generate(QUESTION, max_tokens=60, sampling={})
    return "".join(str(event["text"]) for event in events if event["event"] == "token")


@pytest.fixture(scope="module")
def worker() -> Iterator[RpcWorker]:
    with RpcWorker() as running:
        yield running


def beside(worker: RpcWorker, **changes: object) -> Placement:
    placement = replace(CPU, devices=("RPC0",), rpc_servers=(worker.endpoint,), n_gpu_layers=999)
    return replace(placement, **changes)  # type: ignore[arg-type]


SPLITS = {
    "all on the device": {},
    "half of the layers": {"n_gpu_layers": 5},
    "experts of the tail on the CPU": {"overrides": (Override(r"blk\.[4-7]\.ffn_.*exps", HOST),)},
    "experts of the head on the CPU": {"overrides": (Override(r"blk\.[0-1]\.ffn_.*exps", HOST),)},
    "all experts on the CPU, q8_0 cache": {
        "overrides": (Override("exps", HOST),),
        "kv_type_k": "q8_0",
        "kv_type_v": "q8_0",
    },
    "cache on the CPU": {"kv_offload": False},
}


@pytest.mark.parametrize("name", SPLITS)
def test_every_split_says_the_same_as_the_cpu(name: str, worker: RpcWorker, demo_model: Path) -> None:
    with EngineSession() as session:
        session.open(str(demo_model), beside(worker, **SPLITS[name]))
        held = {size.buffer for size in read_buffer_sizes(session.log) if size.part == "model"}
        assert f"RPC0[{worker.endpoint}]" in held
        assert say_the_sentence(session) == DEMO_SENTENCE


def test_single_tensors_can_be_sent_to_the_device(worker: RpcWorker, demo_model: Path) -> None:
    buffer = f"RPC0[{worker.endpoint}]"
    placement = beside(worker, n_gpu_layers=0, overrides=(Override(r"blk\.2\.ffn_up_exps", buffer),))
    tensor_bytes = 256 * 256 * 8 * 144 // 256  # Q4_K: 144 bytes for 256 weights
    with EngineSession() as session:
        session.open(str(demo_model), placement)
        sizes = {size.buffer: size.bytes for size in read_buffer_sizes(session.log) if size.part == "model"}
        assert sizes[buffer] == pytest.approx(tensor_bytes, abs=11_000)
        assert say_the_sentence(session) == DEMO_SENTENCE


def test_registering_a_worker_twice_lists_it_once(worker: RpcWorker) -> None:
    with EngineSession() as session:
        for _ in range(2):
            devices = session.describe((worker.endpoint,))["devices"]
            assert isinstance(devices, list)
            assert [device["name"] for device in devices].count("RPC0") == 1


def test_a_worker_killed_in_the_middle_of_an_answer_is_explained(demo_model: Path) -> None:
    with RpcWorker() as doomed, EngineSession() as session:
        session.open(str(demo_model), beside(doomed))
        answer = session.generate(QUESTION, max_tokens=1900, sampling={}, ignore_eos=True)
        next(answer)
        os.kill(doomed.pid, signal.SIGKILL)
        with pytest.raises(EngineCrashError, match="RPC worker went away") as caught:
            for _ in answer:
                pass
        assert not session.alive
    assert caught.value.kind == "rpc_lost" and caught.value.exit_code == 7
    assert "qnext worker" in caught.value.hint
    assert any("ggml-rpc" in line for line in caught.value.log_tail)
    with RpcWorker() as fresh, EngineSession() as session:
        session.open(str(demo_model), beside(fresh))
        assert say_the_sentence(session) == DEMO_SENTENCE


def test_a_worker_that_is_not_there_is_explained(demo_model: Path) -> None:
    endpoint = f"{LOOPBACK}:{free_port()}"
    with EngineSession() as session:
        with pytest.raises(EngineCrashError, match="cannot be reached") as caught:
            session.open(str(demo_model), replace(CPU, rpc_servers=(endpoint,), devices=("RPC0",)))
        assert any(endpoint in line for line in caught.value.log_tail)


# --- the worker itself ----------------------------------------------------------------------------------


def test_a_worker_is_not_opened_to_the_network_unasked() -> None:
    with pytest.raises(UsageError, match="no password"):
        RpcWorker(host="0.0.0.0")


def test_a_taken_port_is_refused_before_anything_starts() -> None:
    with socket.socket() as other:
        other.bind((LOOPBACK, 0))
        other.listen()
        with pytest.raises(UsageError, match="already listens"):
            RpcWorker(port=other.getsockname()[1])


def test_an_address_of_another_machine_is_explained() -> None:
    for host in ("192.0.2.1", "no.such.host.invalid"):
        with pytest.raises(EngineError, match="ended at once") as caught:
            RpcWorker(host=host, allow_network=True)
        assert "socket" in caught.value.message and "address" in caught.value.hint


def test_localhost_is_loopback() -> None:
    with RpcWorker(host="localhost") as running:
        assert running.endpoint.startswith("127.0.0.1:")


def test_waiting_for_a_worker_that_dies_says_so() -> None:
    with RpcWorker() as running:
        os.kill(running.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="ended with status -9"):
            running.wait()


def test_ctrl_c_ends_the_worker_command_and_the_worker() -> None:
    command = [sys.executable, "-m", "qnext", "worker", "--port", str(free_port())]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        endpoint = line.split("--rpc ")[-1].strip()
        host, port = endpoint.split(":")
        os.kill(process.pid, signal.SIGINT)
        started = time.monotonic()
        assert process.wait(timeout=10) == 130
        assert time.monotonic() - started < 2
        with socket.socket() as probe:
            assert probe.connect_ex((host, int(port))) != 0, "nothing listens any more"
