"""Which engine serves: python, unless only a llama-server can use a GPU of this machine."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qnext.config import find_paths
from qnext.engine.build import EngineBuild
from qnext.errors import EngineError, UsageError
from qnext.hardware import Machine, load_machine
from qnext.models.synth import synthesise
from qnext.pipeline import serving_engines, surroundings
from qnext.pipeline.request import Request
from qnext.pipeline.serving_engines import choose_engine, plan_for_server

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the program is a shell script")

RTX = "CUDA0: NVIDIA GeForce RTX 4070"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """This machine is one with an NVIDIA card, and its Python engine was built for the CPU."""
    found = load_machine("rtx4070-64gb", Path("nowhere"))
    for room in (serving_engines, surroundings):
        monkeypatch.setattr(room, "detect_machine", lambda *_: found)
    use_build(monkeypatch, "cpu", "rpc")
    return found


def use_build(patch: pytest.MonkeyPatch, *backends: str) -> None:
    build = EngineBuild("llama-cpp-python", "0.3.36", None, "0", backends)
    patch.setattr(serving_engines, "installed_build", lambda: build)


def llama_server(folder: Path, *devices: str) -> str:
    """A program that lists `devices` as llama-server does."""
    lines = "".join(f"echo '  {device} (12281 MiB, 11900 MiB free)'\n" for device in devices)
    path = folder / "llama-server"
    path.write_text(f"#!/bin/sh\necho 'Available devices:'\n{lines}")
    path.chmod(0o755)
    return str(path)


def test_llama_server_is_taken_for_a_gpu_that_python_cannot_use_and_planned_for_it(
    machine: Machine, tmp_path: Path
) -> None:
    taken = choose_engine("auto", llama_server(tmp_path, RTX))
    assert taken.program == str(tmp_path / "llama-server") and "4070" in taken.said
    model = tmp_path / "tiny.gguf"
    synthesise("tiny-qwen3next", model, quant="Q4_K_M", header_only=True)
    request = Request(model=str(model), repack="off", context=4096)
    planned = plan_for_server(request, taken, find_paths(), print)
    assert planned.plan.placement.devices == ("CUDA0",) and planned.plan.placement.n_gpu_layers > 0
    assert not any("is not used" in warning for warning in planned.plan.warnings)
    blind = plan_for_server(request, replace(taken, devices=()), find_paths(), print)
    assert blind.plan.placement.devices == ()


@pytest.mark.parametrize("devices", [(), ("Vulkan1: llvmpipe",)])
def test_python_stays_where_llama_server_cannot_use_the_gpu_either(
    devices: tuple[str, ...], machine: Machine, tmp_path: Path
) -> None:
    taken = choose_engine("auto", llama_server(tmp_path, *devices))
    assert taken.program is None and "stays idle" in taken.said


def test_python_stays_where_it_can_use_everything(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_build(monkeypatch, "cpu", "cuda")
    assert choose_engine("auto", llama_server(tmp_path, RTX)).program is None
    assert choose_engine("llama-server", llama_server(tmp_path, RTX)).devices == (RTX,)


def test_python_stays_where_there_is_no_llama_server(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert choose_engine("auto", None).program is None
    with pytest.raises(EngineError):
        choose_engine("llama-server", None)
    with pytest.raises(UsageError):
        choose_engine("auto", str(tmp_path / "missing"))
