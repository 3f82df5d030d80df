"""Rules of a server that need no engine: when it is tried again, whom it blames, what a unit asks for."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from qnext.cli import serve as serve_command
from qnext.cli.serve import serve
from qnext.engine.crash import CrashKind, EngineCrashError
from qnext.pipeline import serving_restarts
from qnext.pipeline.request import Request
from qnext.pipeline.serve_values import Job
from qnext.pipeline.serving_blame import Suspects
from qnext.pipeline.serving_restarts import Restarts
from qnext.pipeline.serving_wishes import serve_arguments
from qnext.plan.values import Override, Workload


def crash(kind: CrashKind = "crash") -> EngineCrashError:
    return EngineCrashError("it crashed", hint="", kind=kind, log_tail=())


def test_waits_double_and_the_fifth_death_within_five_minutes_is_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(serving_restarts.time, "monotonic", lambda: clock.now)
    restarts = Restarts()
    assert [restarts.after_death() for _ in range(5)] == [1, 2, 4, 8, None]
    rare = Restarts()
    for _ in range(50):
        clock.now += 76
        wait = rare.after_death()
        assert wait is not None and wait <= 8


def test_a_job_alone_at_two_deaths_is_guilty_and_its_neighbours_are_not() -> None:
    suspects, bad, other, third = Suspects(), Job(text="bad"), Job(text="other"), Job(text="third")
    assert suspects.add(crash(), [bad, other]) == []
    assert suspects.add(crash("abort"), [third, bad]) == [bad]
    assert suspects.is_guilty(replace(bad, max_tokens=1)) and not suspects.is_guilty(other)
    assert not suspects.is_guilty(third)


def test_two_jobs_at_two_deaths_are_suspected_but_served() -> None:
    suspects, one, two = Suspects(), Job(tokens=(1, 2)), Job(tokens=(1, 3))
    suspects.add(crash(), [one, two])
    assert len(suspects.add(crash(), [one, two])) == 2
    assert not suspects.is_guilty(one) and not suspects.is_guilty(two)


def test_an_engine_killed_from_outside_is_nobodys_fault() -> None:
    suspects, job = Suspects(), Job(text="x")
    for _ in range(3):
        assert suspects.add(crash("killed"), [job]) == []
    assert not suspects.is_guilty(job)


REQUESTS = [
    Request(model="m.gguf"),
    Request(model="m.gguf", parallel=None, tuned=True),
    Request(
        model="/it's a/$model 100%.gguf",
        workload=Workload(prompt=1, generate=2, depth=0),
        context=8192,
        parallel=3,
        batch=512,
        ubatch=128,
        kv_type_k="q8_0",
        kv_type_v="f16",
        prefer="quality",
        flash_attention="auto",
        load_mode="mmap",
        n_gpu_layers=0,
        cpu_experts=10_000,
        overrides=(Override(r"blk\.(1|2)\..*exps", "CPU"), Override("norm", "CPU")),
        tensor_split=(3.0, 1.25),
        ram=12_345_678_901,
        vram=0,
        ram_headroom=1 << 30,
        vram_headroom=5,
        device_memory={"RPC0": 1 << 33, "CUDA0": 7},
        rpc_servers=("10.0.0.1:50052", "10.0.0.2:50052"),
        threads=3,
        threads_batch=5,
        repack="off",
        min_tps=2.5,
    ),
]


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_units_arguments_ask_for_what_the_plan_was_asked_for(
    request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("QNEXT_THREADS", "QNEXT_THREADS_BATCH"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(serve_command.signal, "signal", lambda *_: None)
    asked: list[Request] = []

    class Enough(Exception):
        pass

    def note_request(request: Request, *_: object, **__: object) -> Request:
        asked.append(request)
        raise Enough

    monkeypatch.setattr(serve_command, "with_model_here", note_request)
    app = typer.Typer()
    app.callback()(lambda: None)
    app.command("serve")(serve)
    words = serve_arguments(request_, request_.model)
    ran = CliRunner().invoke(app, [*words, "--port", "0", "--engine", "python"])
    assert isinstance(ran.exception, Enough), (ran.output, ran.exception)
    assert asked == [replace(request_, tuned=True)]
