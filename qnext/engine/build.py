"""Which engine is installed, found without loading it.

Two distributions share the import name `llama_cpp` (llama-cpp-python and a fork), and one version can be
built in many ways. A wheel's RECORD lists the hash of every installed file, native libraries included, so
the hash of RECORD identifies a build at no cost.

The fork keeps even the distribution's name: only its home page, or a local version such as `0.3.40+cu128`,
tells it apart. pip lets distributions of different names install the same import name over each other, and
then the files on disk are those of whichever came last.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from qnext.errors import EngineError

DISTRIBUTION = "llama-cpp-python"
PINNED_VERSION = "0.3.36"
_LLAMA_COMMITS = {"0.3.36": "0c1e57098"}
"""llama.cpp commit each release bundles, from llama-cpp-python's change log; the wheel does not say."""
_HOME_PAGE = "https://github.com/abetlen/llama-cpp-python"
_BACKEND_LIBRARY = re.compile(r"(?:lib)?ggml-([a-z]+)[^/]*\.(?:so|dylib|dll)\b")
"""`libggml-cpu-haswell.so` is one of several builds of the backend `cpu`."""


@dataclass(frozen=True, slots=True)
class EngineBuild:
    """Identity of the installed engine. `digest` changes with any file of it; `backends` are compiled in."""

    name: str
    version: str
    llama_commit: str | None
    digest: str
    backends: tuple[str, ...]


@cache
def installed_build() -> EngineBuild | None:
    """The engine this Python would load, or None."""
    names = (
        metadata.packages_distributions().get("llama_cpp", []) if _fast_lookup() is None else [DISTRIBUTION]
    )
    if not names:
        return None
    distribution = metadata.distribution(names[0])
    record = distribution.read_text("RECORD") or ""
    files = (line.split(",")[0].rsplit("/", 1)[-1] for line in record.splitlines() if "ggml-" in line)
    backends = {match[1] for match in map(_BACKEND_LIBRARY.match, files) if match} - {"base"}
    return EngineBuild(
        name=_normal_name(distribution),
        version=distribution.version,
        llama_commit=None if _is_fork(distribution) else _LLAMA_COMMITS.get(distribution.version),
        digest=hashlib.sha256(record.encode()).hexdigest()[:16],
        backends=tuple(sorted(backends)),
    )


def _fast_lookup() -> metadata.Distribution | None:
    """The expected distribution by name; listing every package of the environment takes far longer."""
    try:
        return metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None


def require_build() -> EngineBuild:
    """The installed build. Raises EngineError when there is none."""
    build = installed_build()
    if build is None:
        raise EngineError(
            "llama-cpp-python is not installed, so no model can be loaded",
            hint="Run ./scripts/qnext, which builds it, or pip install 'qnext[engine]'.",
        )
    return build


@dataclass(frozen=True, slots=True)
class Installation:
    """How the engine came here. `folder` holds the package `llama_cpp`, the home folder shown as `~`.

    `fork`: it is another project's package under the same import name. `pinned`: it is the very release this
    qnext was written for. `rivals` are other distributions (`name version`) that hold files of `llama_cpp` in
    the same folder: what is on disk is then a mixture. `rpc`: it can use memory of other machines.
    """

    build: EngineBuild
    fork: bool
    pinned: bool
    rpc: bool
    folder: str
    rivals: tuple[str, ...]


def inspect_installation() -> Installation | None:
    """What `qnext doctor` tells of the installed engine, or None. Reads the RECORD of every distribution
    (40 ms in an environment of 65)."""
    build = installed_build()
    if build is None:
        return None
    distribution = metadata.distribution(build.name)
    folder = Path(str(distribution.locate_file("")))
    fork = _is_fork(distribution)
    return Installation(
        build=build,
        fork=fork,
        pinned=not fork and build.version == PINNED_VERSION,
        rpc="rpc" in build.backends,
        folder=show_path(folder / "llama_cpp"),
        rivals=_find_rivals(folder, (build.name, build.version)),
    )


def _find_rivals(folder: Path, chosen: tuple[str, str]) -> tuple[str, ...]:
    claims = {
        (_normal_name(distribution), distribution.version)
        for distribution in metadata.distributions(path=[str(folder)])
        if "llama_cpp/__init__.py," in (distribution.read_text("RECORD") or "")
    }
    return tuple(f"{name} {version}" for name, version in sorted(claims - {chosen}))


def _normal_name(distribution: metadata.Distribution) -> str:
    return re.sub(r"[-_.]+", "-", distribution.name).lower()


def _is_fork(distribution: metadata.Distribution) -> bool:
    page = re.search(
        r"^Project-URL: *Homepage, *(\S+)", distribution.read_text("METADATA") or "", re.MULTILINE
    )
    foreign = page is not None and page[1].rstrip("/") != _HOME_PAGE
    return _normal_name(distribution) != DISTRIBUTION or "+" in distribution.version or foreign


def show_path(path: Path) -> str:
    """The path as text for people and reports, with the home folder, which names the user, as `~`."""
    home = os.path.expanduser("~")  # noqa: PTH111 - Path.home() raises where there is none
    text = str(path)
    inside = home not in ("~", os.sep) and (text == home or text.startswith(home + os.sep))
    return f"~{text[len(home) :]}" if inside else text


_SWITCHES = {
    "cuda": "-DGGML_CUDA=on",
    "rocm": "-DGGML_HIP=on",
    "vulkan": "-DGGML_VULKAN=on",
    "metal": "-DGGML_METAL=on",
    "sycl": "-DGGML_SYCL=on -DCMAKE_C_COMPILER=icx -DCMAKE_CXX_COMPILER=icpx",
}
"""CMake switches by kind of GPU, from llama.cpp's docs/build.md."""


GPU_KINDS = tuple(_SWITCHES)
"""Kinds of GPU that the engine can be built for."""


def rebuild_command(*kinds: str, installed: bool = True, environ: Mapping[str, str] | None = None) -> str:
    """The shell command that compiles the pinned engine for this CPU and for GPUs of all these kinds.

    In the private environment of a checkout that is the set-up behind `./scripts/qnext`, which always adds
    RPC; elsewhere pip, of the Python that qnext runs in; what it depends on stays as it is where the engine
    is `installed` already. CMAKE_ARGS that are set are kept, ours come last.
    """
    environ = os.environ if environ is None else environ
    switches = [_SWITCHES[kind] for kind in dict.fromkeys(kinds) if kind in _SWITCHES]
    checkout = _is_checkout()
    if not checkout:
        switches.append("-DGGML_RPC=on")
    if environ.get("CMAKE_ARGS"):
        switches.insert(0, "$CMAKE_ARGS")
    arguments = f'CMAKE_ARGS="{" ".join(switches)}" ' if switches else ""
    if checkout:
        return f"{arguments}QNEXT_REBUILD_ENGINE=1 ./scripts/qnext --version"
    again = "--force-reinstall --no-deps " if installed else ""
    return (
        f"{arguments}{_pip()} install {again}--no-cache-dir "
        f"--no-binary {DISTRIBUTION} {DISTRIBUTION}=={PINNED_VERSION}"
    )


def _is_checkout() -> bool:
    """Whether this Python is the environment that scripts/qnext of the checkout around it keeps."""
    checkout = Path(__file__).resolve().parents[2]
    return (checkout / "scripts" / "qnext").is_file() and (Path(sys.prefix) / "qnext-ready").is_file()


def _pip() -> str:
    """`pip` where that is the one of this Python, else this Python's by its path."""
    found, ours = shutil.which("pip"), Path(sys.executable).parent
    return "pip" if found and Path(found).parent == ours else f"{show_path(Path(sys.executable))} -m pip"


_COMPILERS = {
    "cuda": (
        ("nvcc", "/usr/local/cuda/bin/nvcc"),
        "the CUDA toolkit (nvcc): sudo apt install nvidia-cuda-toolkit, or NVIDIA's own",
    ),
    "rocm": (("hipcc", "/opt/rocm/bin/hipcc"), "ROCm (hipcc): AMD's packages for your system"),
    "vulkan": (
        ("glslc",),
        "the Vulkan SDK (glslc): sudo apt install glslc libvulkan-dev spirv-headers, or LunarG's own",
    ),
    "metal": (("xcrun",), "Apple's command line tools: xcode-select --install"),
    "sycl": (
        ("icpx", "/opt/intel/oneapi/compiler/latest/bin/icpx"),
        "the oneAPI compiler (icpx): Intel's oneAPI Base Toolkit",
    ),
}
_CXX = (("c++", "g++", "clang++", "cl"), "a C++ compiler: sudo apt install build-essential")


def missing_prerequisites(kind: str = "cpu", environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """What `rebuild_command(kind)` needs and is not here, each with how to get it. Looks at files only."""
    environ = os.environ if environ is None else environ
    path = environ.get("PATH", os.defpath)
    named = {
        "cuda": [environ.get("CUDACXX"), *(f"{environ[n]}/bin/nvcc" for n in _CUDA_HOMES if environ.get(n))],
        "cpu": [environ.get("CXX")],
    }
    wanted = {"cpu": _CXX} | ({kind: _COMPILERS[kind]} if kind in _COMPILERS else {})
    return tuple(
        words
        for part, (programs, words) in wanted.items()
        if not any(
            shutil.which(program, path=path) for program in (*named.get(part, ()), *programs) if program
        )
    )


_CUDA_HOMES = ("CUDA_HOME", "CUDA_PATH")
