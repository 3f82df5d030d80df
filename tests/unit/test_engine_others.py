"""Other engines on PATH: real little programs that answer, lie, hang, flood, fork or cannot start."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qnext.engine.others import OtherEngine, find_other_engines

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the programs are shell scripts")

Program = Callable[..., Path]

VERSION = 'echo "version: 9671 (0c1e57098)" >&2; echo "built with cc for x86_64" >&2'


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """Writes a shell script into a folder that is the whole PATH; returns its path."""

    def write(name: str, text: str, mode: int = 0o755, folder: str = "bin") -> Path:
        path = tmp_path / folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(mode)
        return path

    return write


def _find(tmp_path: Path, deadline_s: float = 1.0, **environ: str) -> dict[str, OtherEngine]:
    given = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", **environ}
    here = str(tmp_path)
    return {e.name: e for e in find_other_engines(given, deadline_s) if e.path and e.path.startswith(here)}


def test_an_empty_path_has_no_engines(tmp_path: Path) -> None:
    assert [engine for engine in find_other_engines({"PATH": str(tmp_path)}) if engine.path] == []


def test_llama_cpp_states_its_version_and_one_program_of_a_folder_its_devices(
    tmp_path: Path, program: Program
) -> None:
    devices = "  CUDA0: NVIDIA GeForce RTX 4090 (24080 MiB, 23000 MiB free)"
    for name in ("llama-server", "llama-cli"):
        program(
            name,
            f'case $1 in --version) {VERSION} ;; *) echo "Available devices:"; echo "{devices}" ;; esac',
        )
    found = _find(tmp_path)
    assert found["llama-server"] == OtherEngine(
        name="llama-server",
        project="llama.cpp",
        path=str(tmp_path / "bin" / "llama-server"),
        version="9671 (0c1e57098)",
        devices=("CUDA0: NVIDIA GeForce RTX 4090",),
    )
    assert (found["llama-cli"].version, found["llama-cli"].devices) == ("9671 (0c1e57098)", None)


def test_a_build_without_gpus_lists_none(tmp_path: Path, program: Program) -> None:
    program(
        "llama-server", 'echo "version: 0.5.0 (build 1, commit abc)"; echo "Available devices:\n  (none)"'
    )
    found = _find(tmp_path)["llama-server"]
    assert (found.version, found.devices) == ("0.5.0 (build 1, commit abc)", ())


def test_a_program_that_hangs_costs_one_deadline_and_leaves_nothing_running(
    tmp_path: Path, program: Program
) -> None:
    pids = tmp_path / "pids"
    for name in ("llama-server", "llama-cli", "llama-bench", "ollama"):
        program(name, f'sleep 60 & echo $! $$ >>"{pids}"; wait')
    began = time.monotonic()
    found = _find(tmp_path, deadline_s=0.4)
    assert time.monotonic() - began < 2
    assert len(found) == 4
    assert {engine.reason for engine in found.values()} == {"it did not answer in time"}
    assert not any(engine.version for engine in found.values())
    _assert_gone(pids)


def test_a_child_that_keeps_the_output_open_does_not_delay_the_answer(
    tmp_path: Path, program: Program
) -> None:
    pids = tmp_path / "pids"
    program("ollama", f'echo "ollama version is 0.12.3"; sleep 60 & echo $! >>"{pids}"')
    began = time.monotonic()
    assert _find(tmp_path, deadline_s=30)["ollama"].version == "0.12.3"
    assert time.monotonic() - began < 5
    _assert_gone(pids)


def test_a_child_that_leaves_the_session_is_not_waited_for(tmp_path: Path, program: Program) -> None:
    argv = "import os, time; os.setsid(); time.sleep(8)"
    program("ollama", f'echo "ollama version is 0.12.3"; "{sys.executable}" -S -c "{argv}" & sleep 0.2')
    began = time.monotonic()
    assert _find(tmp_path, deadline_s=2)["ollama"].version == "0.12.3"
    assert time.monotonic() - began < 4


def test_a_flood_is_cut_and_the_program_ends_with_it(tmp_path: Path, program: Program) -> None:
    program("llama-cli", f"{VERSION}; exec tr '\\0' 'x' </dev/zero")
    program("llama-bench", "exec head -c 1000000 /dev/zero")
    began = time.monotonic()
    found = _find(tmp_path, deadline_s=20)
    assert time.monotonic() - began < 10
    assert found["llama-cli"].version == "9671 (0c1e57098)"
    assert found["llama-bench"].version is None
    assert found["llama-bench"].reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("echo hello", "not understood"),
        ("exit 3", "status 3"),
        ("kill -11 $$", "signal 11"),
        ("printf 'version: \\001\\002\\n'", "not understood"),
        ("echo 'error: unknown argument' >&2; exit 1", "status 1"),
    ],
)
def test_rubbish_is_no_version_and_says_why(tmp_path: Path, program: Program, text: str, reason: str) -> None:
    program("llama-server", text)
    found = _find(tmp_path)["llama-server"]
    assert found.version is None
    assert reason in found.reason
    assert found.devices is None


def test_what_cannot_be_started_is_told_or_passed_over(tmp_path: Path, program: Program) -> None:
    program("ollama", "echo 'ollama version is 1.0'", mode=0o644)
    (tmp_path / "bin" / "llama-server").write_bytes(b"\x7fELF of another machine")
    (tmp_path / "bin" / "llama-server").chmod(0o755)
    found = _find(tmp_path)
    assert set(found) == {"llama-server"}
    assert found["llama-server"].reason.startswith("cannot be started")


def test_programs_get_no_flags_from_the_environment_and_ollama_no_foreign_host(
    tmp_path: Path, program: Program
) -> None:
    program("llama-server", 'echo "version: ${LLAMA_ARG_THREADS-clean} ${GGML_VK_VISIBLE_DEVICES-clean}"')
    program("ollama", 'case $OLLAMA_HOST in 127.*) echo "Warning: client version is 0.5.7" ;; esac')
    environ = {"LLAMA_ARG_THREADS": "x", "GGML_VK_VISIBLE_DEVICES": "1", "OLLAMA_HOST": "10.0.0.7"}
    found = _find(tmp_path, **environ)
    assert found["llama-server"].version == "clean 1"
    assert found["ollama"].version == "0.5.7"


def test_slow_starters_are_found_without_being_run(tmp_path: Path, program: Program) -> None:
    ran = tmp_path / "ran"
    for name in ("vllm", "koboldcpp", "lms"):
        program(name, f'touch "{ran}"')
    (tmp_path / "lib" / "python3.12" / "site-packages" / "vllm-0.11.0.dist-info").mkdir(parents=True)
    found = _find(tmp_path)
    assert not ran.exists()
    assert found["vllm"].version == "0.11.0"
    assert all(found[name].version is None and found[name].reason for name in ("koboldcpp", "lms"))


def test_programs_of_the_current_folder_are_not_run(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(program("llama-server", VERSION).parent)
    assert not [engine for engine in find_other_engines({"PATH": ":.:"}) if engine.name == "llama-server"]


def test_the_home_folder_is_not_named_and_an_ik_build_is_told_by_its_folder(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    built = program("llama-server", VERSION, folder="ik_llama.cpp")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "llama-server").symlink_to(built)
    engines = {engine.name: engine for engine in find_other_engines({"PATH": str(tmp_path / "bin")})}
    assert engines["llama-server"].path == "~/bin/llama-server"
    assert engines["llama-server"].project == "ik_llama.cpp"


def _assert_gone(pids: Path) -> None:
    waiting = {int(word) for word in pids.read_text().split()}
    deadline = time.monotonic() + 5
    while waiting and time.monotonic() < deadline:
        waiting = {pid for pid in waiting if _runs(pid)}
        time.sleep(0.02)
    assert waiting == set()


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
