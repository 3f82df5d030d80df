"""Which llama.cpp backends to compile in, decided from what is on the machine.

A toolkit alone is not enough: CUDA takes half an hour to compile and is of no use where no GPU is visible, so
each backend needs its compiler and its device. RPC is always in: it is how a second machine lends its memory.
The image-model part of llama-cpp-python (a quarter of all files) is left out, since nothing here uses it.
CMAKE_ARGS of the user come last on the command line, and CMake takes the last word on a switch.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Switches:
    """`chosen` are ours, `user` is CMAKE_ARGS as given, `because` one line per decision."""

    chosen: tuple[str, ...]
    user: str
    because: tuple[str, ...]

    @property
    def command_line(self) -> str:
        return " ".join((*self.chosen, self.user)).strip()

    @property
    def compiles_cuda(self) -> bool:
        return "GGML_CUDA=ON" in self.command_line.upper()


def choose_switches(user: str, env: Mapping[str, str]) -> Switches:
    """The switches for this machine; `user` is CMAKE_ARGS."""
    backend, because = _choose_backend(env)
    if user:
        because = (*because, f"your CMAKE_ARGS come last and win: {user}")
    return Switches(("-DGGML_RPC=on", "-DLLAVA_BUILD=off", *backend), user, because)


def _choose_backend(env: Mapping[str, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if platform.system() == "Darwin":
        return ("-DGGML_METAL=on",), ("macOS: Metal",)
    nvcc, nvidia = find_nvcc(env), has_nvidia_gpu()
    hipcc, amd = shutil.which("hipcc") or _existing("/opt/rocm/bin/hipcc"), Path("/dev/kfd").exists()
    if nvcc and nvidia:
        return ("-DGGML_CUDA=on", f"-DCMAKE_CUDA_COMPILER={nvcc}"), (
            f"CUDA toolkit ({nvcc}) and an NVIDIA GPU: CUDA (compiles for 10 to 30 minutes)",
        )
    if hipcc and amd:
        return ("-DGGML_HIP=on",), (f"ROCm ({hipcc}) and an AMD GPU: HIP",)
    if _has_vulkan_sdk(env) and any(Path("/dev/dri").glob("renderD*")):
        return ("-DGGML_VULKAN=on",), ("Vulkan SDK and a GPU: Vulkan",)
    notes = []
    if nvcc:
        notes.append(
            f"CUDA toolkit ({nvcc}) but no NVIDIA GPU visible: CPU only "
            "(CMAKE_ARGS=-DGGML_CUDA=on forces CUDA)"
        )
    if nvidia:
        notes.append(
            "NVIDIA GPU but no CUDA toolkit (nvcc): CPU only. To use the GPU, install the toolkit "
            "(sudo apt install nvidia-cuda-toolkit, or NVIDIA's own), then QNEXT_REBUILD_ENGINE=1"
        )
    if amd and not nvcc:
        notes.append(
            "AMD GPU but no ROCm or Vulkan SDK: CPU only. Install one of them, then QNEXT_REBUILD_ENGINE=1"
        )
    return (), tuple(notes) or ("no GPU toolkit: CPU only",)


def find_nvcc(env: Mapping[str, str]) -> str | None:
    """nvcc as CUDACXX, CUDA_HOME, PATH or the usual folder name it, in this order."""
    named = env.get("CUDACXX")
    if named and shutil.which(named):
        return shutil.which(named)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if env.get(variable) and (found := _existing(f"{env[variable]}/bin/nvcc")):
            return found
    return shutil.which("nvcc") or _existing("/usr/local/cuda/bin/nvcc")


def has_nvidia_gpu() -> bool:
    if Path("/proc/driver/nvidia/version").exists():
        return True
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return False
    try:
        listed = subprocess.run([smi, "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU " in listed.stdout


def _has_vulkan_sdk(env: Mapping[str, str]) -> bool:
    """What ggml's Vulkan backend asks CMake for: glslc, the Vulkan headers and the SPIR-V headers."""
    if shutil.which("glslc") is None:
        return False
    roots = [Path(env[name]) for name in ("VULKAN_SDK",) if env.get(name)] + [
        Path("/usr"),
        Path("/usr/local"),
    ]
    return all(
        any((root / "include" / header).exists() for root in roots)
        for header in ("vulkan/vulkan.h", "spirv/unified1/spirv.h")
    )


def _existing(path: str) -> str | None:
    return path if os.access(path, os.X_OK) else None
