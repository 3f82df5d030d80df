"""The engine: llama-cpp-python at its pinned version, compiled from its source distribution here.

There is no wheel on the index, and pip's own cache of built wheels does not look at CMAKE_ARGS or at the
CPU it compiled for. So built wheels are kept in our cache folder under a key of everything that shapes the
binary, and a second checkout installs in seconds. Sources and object files stay there too until the wheel is
whole: an interrupted compilation goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from environment.place import Place, hold_lock, need_free_space, read_pins
from environment.problems import COMPILER_HINT, SetupError, explain_log
from environment.progress import run_logged, say
from environment.switches import Switches, find_nvcc

NAME = "llama-cpp-python"
_CACHE_NEEDS_BYTES = 1 << 30
_CUDA_NEEDS_BYTES = 4 << 30
# One compiler process of llama.cpp peaks at 0.6 GiB, nvcc at about 2.
_JOB_BYTES = 1 << 30
_CUDA_JOB_BYTES = 2 << 30
_COMPILER_VARIABLES = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAARCHS", "CUDAFLAGS")


def pinned_version(place: Place) -> str:
    pin = read_pins(place.constraints)[NAME]
    return pin.split("==")[1].split()[0]


def prepare_wheel(place: Place, switches: Switches, *, rebuild: bool) -> Path:
    """The engine's wheel for this machine and these switches: from the cache, or compiled now."""
    home = place.cache / "engine" / build_key(place, switches)
    with hold_lock(place.cache / "engine" / f"{home.name}.lock", "Compiling the same engine") as lock:
        if rebuild:
            shutil.rmtree(home, ignore_errors=True)
        wheel = next(home.glob("*.whl"), None)
        if wheel is not None:
            compiled = time.strftime("%Y-%m-%d", time.localtime(wheel.stat().st_mtime))
            say(f"llama.cpp: using the engine compiled on {compiled} ({home})")
            return wheel
        return _compile_wheel(place, switches, home, lock)


def _compile_wheel(place: Place, switches: Switches, home: Path, lock: int) -> Path:
    needs = _CUDA_NEEDS_BYTES if switches.compiles_cuda else _CACHE_NEEDS_BYTES
    need_free_space(home, needs, "Compiling llama.cpp", "XDG_CACHE_HOME")
    source = home / "source"
    resumed = (home / "source.complete").exists()
    if resumed:
        say("llama.cpp: going on with an interrupted compilation")
    else:
        unpack_source(fetch_source(place), source)
        (home / "source.complete").touch()
    (home / "switches.txt").write_text(switches.command_line + "\n")
    jobs = count_jobs(place.env, switches)
    made = home / "made"
    # fmt: off
    argv = place.pip(
        "wheel", "--verbose", "--no-deps", "--no-index", "--no-build-isolation", "--no-cache-dir",
        "--config-settings", f"build-dir={home / 'build'}", "--wheel-dir", str(made), str(source),
    )
    # fmt: on
    log = home / "compile.log"
    log.unlink(missing_ok=True)
    finished = run_logged(
        argv,
        label=f"compiling llama.cpp with {jobs} {'job' if jobs == 1 else 'jobs'}",
        log=log,
        env={**place.env, "CMAKE_ARGS": switches.command_line, "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs)},
        keep_open=(lock,),
    )
    wheel = next(made.glob("*.whl"), None)
    if not finished or wheel is None:
        if resumed:  # what the interruption left may be the cause
            shutil.rmtree(home / "build", ignore_errors=True)
        raise explain_log(log, "llama.cpp did not compile", place.cache)
    kept = home / wheel.name
    wheel.replace(kept)
    for leftover in (source, home / "build", made):
        shutil.rmtree(leftover, ignore_errors=True)
    (home / "source.complete").unlink()
    return kept


def fetch_source(place: Place) -> Path:
    """The pinned source distribution, from the cache folder, QNEXT_ENGINE_SDIST or the package index."""
    version = pinned_version(place)
    hashes = set(re.findall(r"sha256:([0-9a-f]{64})", read_pins(place.constraints)[NAME]))
    kept = place.cache / "engine" / f"llama_cpp_python-{version}.tar.gz"
    given = place.env.get("QNEXT_ENGINE_SDIST")
    for candidate in (Path(given) if given else kept, kept):
        if candidate.exists() and _sha256(candidate) in hashes:
            return candidate
    if given:
        raise SetupError(
            f"QNEXT_ENGINE_SDIST={given} is not the source distribution of {NAME} {version} that is pinned.",
            "Name the right file, or unset it to fetch the file from the package index.",
        )
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        wanted = Path(scratch) / "engine.txt"
        wanted.write_text(read_pins(place.constraints)[NAME])
        log = place.log
        # fmt: off
        argv = place.pip(
            "download", "--no-deps", "--require-hashes", "--no-binary", ":all:", "--no-build-isolation",
            "--no-cache-dir", "--dest", scratch, "--requirement", str(wanted),
        )
        # fmt: on
        if not run_logged(argv, label="fetching the source of llama.cpp (77 MB)", log=log, env=place.env):
            raise explain_log(log, "The source of llama.cpp was not fetched", place.cache)
        next(Path(scratch).glob("*.tar.gz")).replace(kept)
    return kept


def unpack_source(archive: Path, target: Path) -> None:
    """Unpack a source distribution's one top folder as `target`, which is replaced."""
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        with tarfile.open(archive) as tar:
            if hasattr(tarfile, "data_filter"):  # Python 3.11.4; the archive's hash is checked anyway
                tar.extraction_filter = tarfile.data_filter
            tar.extractall(scratch)
        next(Path(scratch).iterdir()).rename(target)


def install_wheel(place: Place, wheel: Path, switches: Switches, lock: int) -> None:
    """Install the wheel and see that it loads; then note what it was built with."""
    argv = place.pip("install", "--no-deps", "--no-index", "--force-reinstall", str(wheel))
    if not run_logged(argv, label="installing llama.cpp", log=place.log, env=place.env, keep_open=(lock,)):
        raise explain_log(place.log, "llama.cpp was not installed", place.cache)
    loads = [str(place.python), "-P", "-c", "import llama_cpp; llama_cpp.llama_backend_init()"]
    if not run_logged(loads, label="loading llama.cpp once", log=place.log, env=place.env):
        raise SetupError(
            "llama.cpp compiled, but it does not load.",
            f"See the end of {place.log}; QNEXT_REBUILD_ENGINE=1 before the command compiles it anew, "
            "CMAKE_ARGS changes how.",
        )
    note = {"version": pinned_version(place), "user": switches.user, "switches": switches.command_line}
    (place.venv / "qnext-engine.json").write_text(json.dumps(note, indent=1) + "\n")


def read_note(venv: Path) -> dict[str, str] | None:
    """What install_wheel noted; None where there is no engine of ours."""
    try:
        note: dict[str, str] = json.loads((venv / "qnext-engine.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    return note


def find_compiler(place: Place) -> list[str]:
    """The C++ compiler CMake will take (CXX, then the usual names), seen to compile and link C++17."""
    named = place.env.get("CXX", "").split()
    candidates = [named] if named else [["c++"], ["g++"], ["clang++"]]
    path = place.env["PATH"]
    found = next((argv for argv in candidates if shutil.which(argv[0], path=path)), None)
    if found is None:
        raise SetupError(
            f"No C++ compiler found ({', '.join(argv[0] for argv in candidates)}).", COMPILER_HINT
        )
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch) / "try.cpp"
        program.write_text(
            "#include <filesystem>\nint main() { return std::filesystem::path().empty() ? 0 : 1; }\n"
        )
        trial = subprocess.run(
            [*found, "-std=c++17", str(program), "-o", str(program.with_suffix(""))],
            capture_output=True, text=True, env=dict(place.env), check=False,
        )  # fmt: skip
    if trial.returncode != 0:
        raise SetupError(
            f"{found[0]} does not compile C++17.", COMPILER_HINT, tail=trial.stderr.strip()[-600:]
        )
    return found


def count_jobs(env: Mapping[str, str], switches: Switches) -> int:
    """Compiler processes at once: usable cores, fewer where memory is short. The user's number wins."""
    if env.get("CMAKE_BUILD_PARALLEL_LEVEL", "").isdigit():
        return max(1, int(env["CMAKE_BUILD_PARALLEL_LEVEL"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    available = _available_memory_bytes()
    if available is None:
        return cores
    return max(1, min(cores, available // (_CUDA_JOB_BYTES if switches.compiles_cuda else _JOB_BYTES)))


def _available_memory_bytes() -> int | None:
    """MemAvailable, or what the cgroup leaves if that is less; None where neither can be read."""
    try:
        match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    limits = [int(match.group(1)) << 10] if match else []
    try:
        limit, used = (
            Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current")
        )
        limits += [int(limit) - int(used)] if limit.isdigit() else []
    except OSError:
        pass
    return min(limits, default=None)


def build_key(place: Place, switches: Switches) -> str:
    """Short digest of all that shapes the binary: version, switches, compilers and their flags, CPU, libc."""
    programs = [
        find_compiler(place)[0],
        *(found for found in [find_nvcc(place.env)] if found and switches.compiles_cuda),
    ]
    # fmt: off
    parts = [
        pinned_version(place), switches.command_line, platform.machine(), platform.system(), _cpu_identity(),
        *platform.libc_ver(),
        *(f"{name}={place.env.get(name, '')}" for name in _COMPILER_VARIABLES),
        *(_ask_version(program) for program in programs),
    ]
    # fmt: on
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _ask_version(program: str) -> str:
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout


def _cpu_identity() -> str:
    """The instruction sets that -march=native would use."""
    try:
        match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return platform.processor()
    return " ".join(sorted(match.group(1).split())) if match else platform.processor()


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
