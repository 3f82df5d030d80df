"""The installed engine told from its fork and its rivals, and the command that builds it again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qnext.engine import build as build_module
from qnext.engine.build import (
    PINNED_VERSION,
    Installation,
    inspect_installation,
    installed_build,
    missing_prerequisites,
    rebuild_command,
    show_path,
)
from qnext.engine.instructions import (
    compiled_sets,
    instructions_entry,
    parse_system_info,
)

UPSTREAM = "https://github.com/abetlen/llama-cpp-python"
FORK = "https://github.com/JamePeng/llama-cpp-python"


class Packages:
    """A site-packages folder that is all of `sys.path`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(
        self,
        version: str,
        *libraries: str,
        name: str = "llama_cpp_python",
        page: str = UPSTREAM,
        package: str = "llama_cpp",
    ) -> None:
        info = self.folder / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nProject-URL: Homepage, {page}\n"
        (info / "METADATA").write_text(metadata)
        files = [f"{package}/__init__.py", "lib/cmake/ggml/ggml-config.cmake", "include/ggml-vulkan.h"]
        files += [f"{package}/lib/{library}" for library in libraries]
        (info / "RECORD").write_text("".join(f"{file},sha256=x,1\n" for file in files))
        (info / "top_level.txt").write_text(f"{package}\n")

    def inspect(self) -> Installation:
        installed_build.cache_clear()
        found = inspect_installation()
        assert found is not None
        return found


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Packages]:
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site-packages")])
    installed_build.cache_clear()
    yield Packages(tmp_path / "site-packages")
    installed_build.cache_clear()


def test_no_engine_is_no_installation(packages: Packages) -> None:
    packages.install("2.0", name="numpy", package="numpy")
    assert inspect_installation() is None


def test_the_pinned_release_is_told_with_its_backends(packages: Packages) -> None:
    packages.install(PINNED_VERSION, "libggml-base.so.0", "libggml-cpu.so", "libggml-cuda.so", "libllama.so")
    found = packages.inspect()
    assert (found.fork, found.pinned, found.rpc, found.rivals) == (False, True, False, ())
    assert found.build.name == "llama-cpp-python"
    assert found.build.backends == ("cpu", "cuda")
    assert found.build.llama_commit == "0c1e57098"
    assert found.folder == str(packages.folder / "llama_cpp")


@pytest.mark.parametrize(
    "libraries",
    [
        ("libggml-base.dylib", "libggml-cpu.dylib", "libggml-rpc.dylib"),
        ("ggml-base.dll", "ggml-cpu.dll", "ggml-rpc.dll"),
        ("libggml-base.so", "libggml-cpu-haswell.so", "libggml-cpu-alderlake.so", "libggml-rpc.so"),
    ],
)
def test_backends_are_found_under_every_systems_names(packages: Packages, libraries: tuple[str, ...]) -> None:
    packages.install(PINNED_VERSION, *libraries)
    found = packages.inspect()
    assert found.build.backends == ("cpu", "rpc")
    assert found.rpc


@pytest.mark.parametrize(
    ("version", "page"),
    [(f"{PINNED_VERSION}+cu128", UPSTREAM), (PINNED_VERSION, FORK), ("0.3.40+cu130", FORK)],
)
def test_a_fork_is_never_the_pinned_release_whatever_its_version(
    packages: Packages, version: str, page: str
) -> None:
    packages.install(version, page=page)
    found = packages.inspect()
    assert (found.fork, found.pinned, found.build.llama_commit) == (True, False, None)


def test_another_release_of_the_same_project_is_no_fork(packages: Packages) -> None:
    packages.install("0.3.2")
    found = packages.inspect()
    assert (found.fork, found.pinned, found.build.llama_commit) == (False, False, None)


def test_distributions_that_overwrite_each_other_are_told(packages: Packages) -> None:
    packages.install(PINNED_VERSION)
    packages.install("0.3.9", name="llama_cpp_python_cuda")
    packages.install("1.0", name="llama_cpp_agent", package="llama_cpp_agent")
    found = packages.inspect()
    assert found.build.version == PINNED_VERSION
    assert found.rivals == ("llama-cpp-python-cuda 0.3.9",)


def test_a_distribution_of_another_name_alone_is_a_fork(packages: Packages) -> None:
    packages.install("0.3.9", name="llama_cpp_python_cuda")
    found = packages.inspect()
    assert (found.build.name, found.fork) == ("llama-cpp-python-cuda", True)


def test_the_home_folder_is_not_named(packages: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(packages.folder.parent))
    packages.install(PINNED_VERSION)
    assert packages.inspect().folder == "~/site-packages/llama_cpp"
    assert show_path(packages.folder.parent.with_name("other")) == str(
        packages.folder.parent.with_name("other")
    )


def test_a_checkout_is_rebuilt_by_its_own_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "_is_checkout", lambda: True)
    assert rebuild_command(environ={}) == "QNEXT_REBUILD_ENGINE=1 ./scripts/qnext --version"
    assert (
        rebuild_command("cuda", environ={})
        == 'CMAKE_ARGS="-DGGML_CUDA=on" QNEXT_REBUILD_ENGINE=1 ./scripts/qnext --version'
    )


@pytest.mark.parametrize("kind", ["cuda", "rocm", "vulkan", "metal", "sycl", "cpu"])
def test_elsewhere_pip_compiles_the_pinned_release(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "_is_checkout", lambda: False)
    command = rebuild_command(kind, environ={})
    backend = {"cuda": "CUDA", "rocm": "HIP", "vulkan": "VULKAN", "metal": "METAL", "sycl": "SYCL"}.get(kind)
    assert command.startswith(f'CMAKE_ARGS="-DGGML_{backend}=on' if backend else 'CMAKE_ARGS="-DGGML_RPC=on"')
    assert "-DGGML_RPC=on" in command
    assert command.endswith(f"--no-binary llama-cpp-python llama-cpp-python=={PINNED_VERSION}")


@pytest.mark.skipif(sys.platform == "win32", reason="the command is for a POSIX shell")
def test_the_users_own_switches_are_kept_by_the_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command, run in a shell with a pip that shows what it got."""
    monkeypatch.setattr(build_module, "_is_checkout", lambda: False)
    monkeypatch.setattr(build_module, "_pip", lambda: str(tmp_path / "pip"))
    (tmp_path / "pip").write_text('#!/bin/sh\necho "$CMAKE_ARGS|$1"\n')
    (tmp_path / "pip").chmod(0o755)
    environ = {"CMAKE_ARGS": '-DX="a b"', "PATH": "/usr/bin:/bin"}
    command = rebuild_command("cuda", environ=environ)
    assert "a b" not in command
    said = subprocess.run(["sh", "-c", command], env=environ, capture_output=True, text=True, check=True)
    assert said.stdout == '-DX="a b" -DGGML_CUDA=on -DGGML_RPC=on|install\n'


def test_a_missing_toolkit_is_named_and_one_off_the_path_is_found(tmp_path: Path) -> None:
    def write(name: str) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)

    environ = {"PATH": str(tmp_path / "bin")}
    compiler, toolkit = missing_prerequisites("sycl", environ)
    assert "C++ compiler" in compiler
    assert "icpx" in toolkit
    write("bin/g++")
    assert missing_prerequisites("cpu", environ) == ()
    assert any("glslc" in words for words in missing_prerequisites("vulkan", environ))
    write("bin/glslc")
    assert missing_prerequisites("vulkan", environ) == ()
    write("bin/nvcc")
    assert missing_prerequisites("cuda", {"PATH": environ["PATH"], "CUDA_HOME": str(tmp_path)}) == ()


def test_instruction_sets_are_read_from_the_cpu_part_alone() -> None:
    cpu = "CPU : SSE3 = 1 | SSSE3 = 1 | AVX2 = 1 | AVX512 = 1 | AMX_INT8 = 0 | LLAMAFILE = 1 | REPACK = 1 | "
    gpu = "CUDA : ARCHS = 890 | USE_GRAPHS = 1 | FMA = 1 | "
    for text in (cpu, gpu + cpu, cpu + gpu):
        assert parse_system_info(text) == ("avx2", "avx512f", "ssse3")
    assert parse_system_info("CPU : NEON = 1 | MATMUL_INT8 = 1 | SVE_CNT = 32 | ") == ("i8mm", "neon")
    assert parse_system_info("CPU : LLAMAFILE = 1 | ") == ()
    assert parse_system_info(gpu) is None
    assert parse_system_info("") is None


def test_remembered_sets_hold_for_their_build_alone(packages: Packages, tmp_path: Path) -> None:
    packages.install(PINNED_VERSION)
    build = packages.inspect().build
    entry = instructions_entry(tmp_path, "fingerprint", build)
    assert compiled_sets(build, entry, ask=False).sets is None
    assert compiled_sets(build, entry, ask=False).reason
    entry.write_text(f'{{"build": "{build.digest}", "sets": ["avx"], "illegal": false}}')
    assert compiled_sets(build, entry, ask=False).sets == ("avx",)
    entry.write_text(f'{{"build": "{build.digest}", "sets": null, "illegal": true}}')
    assert compiled_sets(build, entry, ask=False).illegal
    for broken in ('{"build": "other", "sets": ["avx"], "illegal": false}', "{", "[]", '{"build": null}'):
        entry.write_text(broken)
        assert compiled_sets(build, entry, ask=False).sets is None
