"""The set-up behind scripts/qnext: when it runs, what it refuses, what an interruption leaves."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from environment import engine, progress, steps, switches  # noqa: E402
from environment.place import Place, find_place, read_pins  # noqa: E402
from environment.problems import SetupError, explain_log  # noqa: E402


def _write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose environment is ready, with programs that say what they were started for."""
    root = tmp_path / "checkout"
    (root / "scripts").mkdir(parents=True)
    for name in ("qnext", "environment.sh"):
        shutil.copy2(ROOT / "scripts" / name, root / "scripts" / name)
    (root / "constraints.txt").write_text("numpy==2.4.6\n")
    venv = root / ".venv"
    _write_program(venv / "bin" / "python", 'shift 2; echo "STARTED $*"')
    _write_program(root / "new-python", 'case $1 in -c) exit 0 ;; esac; echo "SETUP"')
    (venv / "qnext-ready").write_text(f"{root}\nengine\n-DGGML_CUDA=on\n")
    shutil.copyfile(root / "constraints.txt", venv / "qnext-constraints.txt")
    return root


def _start(root: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "QNEXT_PYTHON": str(root / "new-python"), **settings}
    argv = [str(root / "scripts" / "qnext"), "plan", "two words"]
    return subprocess.run(argv, env=env, cwd="/", capture_output=True, text=True, check=False)


def test_a_ready_environment_starts_without_setup(checkout: Path) -> None:
    ran = _start(checkout)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "STARTED plan two words\n", "")


def test_a_link_to_the_command_finds_its_checkout(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "qnext").symlink_to(checkout / "scripts" / "qnext")
    ran = subprocess.run([str(tmp_path / "qnext"), "plan"], capture_output=True, text=True, check=False)
    assert ran.stdout == "STARTED plan\n"


def _change_pins(root: Path) -> dict[str, str]:
    (root / "constraints.txt").write_text("numpy==2.4.7\n")
    return {}


def _lose_stamp(root: Path) -> dict[str, str]:
    (root / ".venv" / "qnext-ready").unlink()
    return {}


def _cut_stamp(root: Path) -> dict[str, str]:
    (root / ".venv" / "qnext-ready").write_text(f"{root}\n")
    return {}


def _come_from_elsewhere(root: Path) -> dict[str, str]:
    (root / ".venv" / "qnext-ready").write_text("/elsewhere\nengine\n\n")
    return {}


def _lack_the_engine(root: Path) -> dict[str, str]:
    (root / ".venv" / "qnext-ready").write_text(f"{root}\nnone\n\n")
    return {}


@pytest.mark.parametrize(
    "change",
    [
        _change_pins,
        _lose_stamp,
        _cut_stamp,
        _come_from_elsewhere,
        _lack_the_engine,
        lambda root: {"CMAKE_ARGS": "-DGGML_CUDA=off"},
        lambda root: {"CMAKE_ARGS": ""},
        lambda root: {"QNEXT_REBUILD_ENGINE": "1"},
    ],
)
def test_setup_runs_when_the_environment_no_longer_fits(
    checkout: Path, change: Callable[[Path], dict[str, str]]
) -> None:
    assert _start(checkout, **change(checkout)).stdout == "SETUP\nSTARTED plan two words\n"


def test_no_engine_wanted_and_none_there_is_ready(checkout: Path) -> None:
    _lack_the_engine(checkout)
    assert _start(checkout, QNEXT_NO_ENGINE="1").stdout == "STARTED plan two words\n"


def test_the_cmake_args_it_was_built_with_are_ready(checkout: Path) -> None:
    assert _start(checkout, CMAKE_ARGS="-DGGML_CUDA=on").stdout == "STARTED plan two words\n"


def test_too_old_a_python_names_the_package(checkout: Path) -> None:
    _lose_stamp(checkout)
    _write_program(checkout / "new-python", 'case $1 in -c) exit 1 ;; esac; echo "Python 3.9.2"')
    ran = _start(checkout)
    assert ran.returncode == 1
    first, second = ran.stderr.splitlines()
    assert "3.9.2" in first
    assert "python3.11-venv" in second
    assert ran.stdout == ""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("QNEXT_HOME", str(tmp_path / "home"))
    (tmp_path / "venv").mkdir()
    return find_place(ROOT, tmp_path / "venv")


def test_no_compiler_names_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SetupError, match="No C\\+\\+ compiler") as caught:
        engine.find_compiler(find_place(ROOT, tmp_path / "venv"))
    assert "build-essential" in caught.value.hint
    assert "gcc-c++" in caught.value.hint


def test_a_compiler_that_cannot_compile_is_told_from_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_program(tmp_path / "broken", 'echo "cannot find -lstdc++" >&2; exit 1')
    monkeypatch.setenv("CXX", str(tmp_path / "broken"))
    with pytest.raises(SetupError, match="does not compile") as caught:
        engine.find_compiler(find_place(ROOT, tmp_path / "venv"))
    assert "lstdc++" in caught.value.tail


def test_rpc_is_compiled_in_and_the_users_switches_come_last() -> None:
    chosen = switches.choose_switches("-DGGML_RPC=off", {})
    assert "-DGGML_RPC=on" in chosen.chosen
    assert chosen.command_line.endswith("-DGGML_RPC=off")


def test_a_toolkit_without_a_gpu_is_not_compiled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_program(tmp_path / "nvcc", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(switches, "has_nvidia_gpu", lambda: False)
    chosen = switches.choose_switches("", {"CUDACXX": str(tmp_path / "nvcc")})
    assert not chosen.compiles_cuda
    monkeypatch.setattr(switches, "has_nvidia_gpu", lambda: True)
    assert (
        sys.platform == "darwin"
        or switches.choose_switches("", {"CUDACXX": str(tmp_path / "nvcc")}).compiles_cuda
    )


def test_jobs_follow_the_users_number_and_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = switches.choose_switches("", {})
    assert engine.count_jobs({"CMAKE_BUILD_PARALLEL_LEVEL": "5"}, chosen) == 5
    monkeypatch.setattr(engine, "_available_memory_bytes", lambda: 300 << 20)
    assert engine.count_jobs({}, chosen) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("Failed to establish a new connection: [Errno 111] Connection refused", "cannot be reached"),
        ("ERROR: No matching distribution found for numpy==2.4.6", "has no numpy==2.4.6"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "hash differs"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "out of memory"),
    ],
)
def test_a_failed_program_is_explained_in_two_lines(tmp_path: Path, line: str, message: str) -> None:
    log = tmp_path / "log"
    log.write_text(f"some output\n{line}\nmore output\n")
    error = explain_log(log, "The packages were not installed", tmp_path)
    assert message in error.message
    assert "\n" not in error.message + error.hint
    assert error.hint
    assert error.tail == ""


def test_an_unknown_failure_shows_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("fine\nggml.c:12: error: something new\n")
    error = explain_log(log, "llama.cpp did not compile", tmp_path)
    assert "something new" in error.tail
    assert str(log) in error.hint


def _install(packages: Path, size: int) -> None:
    """A package whose one file has 4 bytes and is recorded with `size`."""
    (packages / "thing").mkdir(parents=True)
    (packages / "thing" / "__init__.py").write_text("x=1\n")
    (packages / "thing-1.0.dist-info").mkdir()
    (packages / "thing-1.0.dist-info" / "RECORD").write_text(
        f"thing/__init__.py,sha256=x,{size}\n../../../bin/thing,,\nthing-1.0.dist-info/RECORD,,\n"
    )


@pytest.mark.parametrize(
    "fault", ["none", "size", "missing file", "no record", "pip's leftover", "no python"]
)
def test_only_a_whole_environment_is_kept(place: Place, fault: str) -> None:
    packages = place.venv / "lib" / "python3.11" / "site-packages"
    _install(packages, 5 if fault == "size" else 4)
    (place.venv / "pyvenv.cfg").touch()
    _write_program(place.python, "echo True")
    if fault == "missing file":
        (packages / "thing" / "__init__.py").unlink()
    elif fault == "no record":
        (packages / "thing-1.0.dist-info" / "RECORD").unlink()
    elif fault == "pip's leftover":
        (packages / "~hing").mkdir()
    elif fault == "no python":
        place.python.unlink()
    assert (steps._find_fault(place) is None) == (fault == "none")


def test_a_folder_of_someone_else_is_left_alone(place: Place) -> None:
    (place.venv / "thesis.tex").write_text("years of work")
    with pytest.raises(SetupError, match="was not made by qnext"):
        steps.make_environment(ROOT, place.venv)
    assert (place.venv / "thesis.tex").read_text() == "years of work"


def test_pins_are_read_with_their_hashes() -> None:
    pins = read_pins(ROOT / "constraints.txt")
    assert pins["numpy"].startswith("numpy==")
    assert all("--hash=sha256:" in block for block in pins.values())


_HOLD_LOCK = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from environment.place import hold_lock
with hold_lock(Path(sys.argv[2]), "Set-up"):
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
"""


def test_a_second_setup_waits_for_the_first_and_says_so(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", _HOLD_LOCK, str(ROOT / "scripts"), str(tmp_path / "lock")]
    with subprocess.Popen([*argv, "0.5"], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        first.stdout.readline()
        began = time.monotonic()
        second = subprocess.run([*argv, "0"], capture_output=True, text=True, check=True)
        assert time.monotonic() - began > 0.3
    assert "waiting for it" in second.stderr


_RUN_LONG = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from environment.progress import run_logged
program = ["sh", "-c", "sleep 60 & echo $! $$; wait"]
run_logged(program, label="compiling", log=Path(sys.argv[2]), env=os.environ)
"""


def test_ctrl_c_leaves_no_process_behind(tmp_path: Path) -> None:
    log = tmp_path / "log"
    argv = [sys.executable, "-c", _RUN_LONG, str(ROOT / "scripts"), str(log)]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as running:
        while not log.exists() or not log.read_text().strip():
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=10)
    assert "stopped" in said
    deadline = time.monotonic() + 5
    alive = [int(pid) for pid in log.read_text().split()[:2]]
    while alive and time.monotonic() < deadline:
        alive = [pid for pid in alive if _is_running(pid)]
        time.sleep(0.02)
    assert alive == []


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_progress_counts_files_in_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = progress._Line("compiling", time.monotonic() - 40)
    line._said_at -= 40
    line.update(b"[20/140] c++ a.cpp\n[21/140] c++ b.cpp\n")
    assert "21 of 140 files" in capsys.readouterr().err
