"""Inherited variables: which are told, which reach the engine, and that no value of a person's gets out."""

from __future__ import annotations

import pytest

from qnext.engine.child import child_environment
from qnext.engine.environment import inherited


def _names(environ: dict[str, str], reaches: bool) -> list[str]:
    return [found.name for found in inherited(environ) if found.reaches_engine is reaches]


def test_switches_inside_the_library_reach_the_engine_and_those_of_other_programs_do_not() -> None:
    environ = {
        "GGML_OP_OFFLOAD_MIN_BATCH": "64",
        "GGML_VK_SOMETHING_NEW": "1",
        "LLAMA_GRAPH_REUSE_DISABLE": "1",
        "CUDA_VISIBLE_DEVICES": "1",
        "KMP_BLOCKTIME": "0",
        "LD_PRELOAD": "/opt/lib/libjemalloc.so",
        "LLAMA_ARG_CTX_SIZE": "1024",
        "LLAMA_SET_ROWS": "1",
        "OLLAMA_FLASH_ATTENTION": "1",
        "HF_HUB_OFFLINE": "1",
        "PATH": "/bin",
        "HFX": "1",
        "GGML": "1",
    }
    assert _names(environ, True) == [
        "CUDA_VISIBLE_DEVICES",
        "GGML_OP_OFFLOAD_MIN_BATCH",
        "GGML_VK_SOMETHING_NEW",
        "KMP_BLOCKTIME",
        "LD_PRELOAD",
        "LLAMA_GRAPH_REUSE_DISABLE",
    ]
    assert _names(environ, False) == [
        "HF_HUB_OFFLINE", "LLAMA_ARG_CTX_SIZE", "LLAMA_SET_ROWS", "OLLAMA_FLASH_ATTENTION",
    ]  # fmt: skip


def test_what_is_said_to_reach_the_child_is_in_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ARG_THREADS", "64")
    monkeypatch.setenv("GGML_SCHED_DEBUG", "2")
    child = child_environment()
    for found in inherited():
        if found.name.startswith(("LLAMA_ARG_", "GGML_")):
            assert (found.name in child) is found.reaches_engine


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("GGML_OP_OFFLOAD_MIN_BATCH", "64", "64"),
        ("CUDA_VISIBLE_DEVICES", "", ""),
        ("CUDA_VISIBLE_DEVICES", "0,1", "0,1"),
        ("CUDA_VISIBLE_DEVICES", "-1", "-1"),
        ("CUDA_VISIBLE_DEVICES", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", None),
        ("CUDA_DEVICE_ORDER", "PCI_BUS_ID", "PCI_BUS_ID"),
        ("OMP_PROC_BIND", "close", "close"),
        ("LD_PRELOAD", "/home/anna/lib.so", None),
        ("HF_HOME", "/home/anna/hf", None),
        ("HF_TOKEN", "123456", None),
        ("LLAMA_ARG_API_KEY", "1234", None),
        ("OLLAMA_HOST", "10.0.0.7:11434", None),
    ],
)
def test_only_harmless_values_are_kept(name: str, value: str, shown: str | None) -> None:
    (found,) = inherited({name: value})
    assert found.value == shown
    assert value == "" or shown is not None or value not in repr(found)


def test_a_variable_of_its_own_is_explained_before_its_family() -> None:
    (own, family) = inherited({"GGML_CUDA_NO_PINNED": "1", "GGML_CUDA_OTHER": "1"})
    assert "page-locked" in own.effect
    assert "CUDA backend" in family.effect
