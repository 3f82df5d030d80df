"""The plan as a `docker run` of llama.cpp's published server images.

Tags, entry point and `LLAMA_ARG_HOST=0.0.0.0` are those of llama.cpp's docs/docker.md and its Dockerfiles in
.devops; the images are built per backend and without RPC. In the Hugging Face cache a model is a link from
`snapshots/<commit>/` to `blobs/`, so the folder mounted there is the repository's, which holds both.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence

from qnext.errors import UsageError
from qnext.plan.values import Placement

IMAGE = "ghcr.io/ggml-org/llama.cpp"
MOUNTED_AT = "/models"

_DRI = ("--device", "/dev/dri")
_GROUPS = tuple(f'"$(getent group {name} | cut -d: -f3)"' for name in ("video", "render"))
"""Group numbers of this machine: the images do not know the names."""
_GROUP_FLAGS = ("--group-add", _GROUPS[0], "--group-add", _GROUPS[1])

_BACKENDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "CUDA": ("server-cuda", ("--gpus", "all")),
    "ROCm": ("server-rocm", ("--device", "/dev/kfd", *_DRI, *_GROUP_FLAGS)),
    "Vulkan": ("server-vulkan", (*_DRI, *_GROUP_FLAGS)),
    "SYCL": ("server-intel", (*_DRI, *_GROUP_FLAGS)),
}
"""Engine device name without its number: the image's tag and what gives the container the devices."""

_NOTES = {
    "CUDA": "needs the NVIDIA Container Toolkit",
    "ROCm": "needs an amdgpu driver on the host that is as new as the image's ROCm",
    "Vulkan": "an NVIDIA card needs --gpus all -e NVIDIA_DRIVER_CAPABILITIES=all instead of the devices",
    "SYCL": "needs the Intel GPU driver on the host",
}


def docker_words(
    placement: Placement, argv: Sequence[str]
) -> tuple[list[str], tuple[str, ...], tuple[str, ...]]:
    """The words of the command, those of them that the shell has to expand, and notes.

    Raises UsageError for devices that no published image can use.
    """
    tag, gpu_flags, notes = _backend(placement)
    arguments = list(argv[1:])
    model = arguments.index("-m") + 1
    folder, arguments[model] = mounted(arguments[model])
    words = ["docker", "run", "--rm", *gpu_flags]
    if "mlock" in placement.load_mode:
        words += ["--ulimit", "memlock=-1"]
    words += ["--mount", f"type=bind,{_csv(f'src={folder}')},dst={MOUNTED_AT},readonly"]
    words += ["-p", "127.0.0.1:8080:8080", f"{IMAGE}:{tag}", *arguments]
    return (
        words,
        _GROUPS,
        (*notes, "the image brings its own llama.cpp, which moves on: name one with its tag"),
    )


def mounted(model: str) -> tuple[str, str]:
    """The folder to mount for a model file, and the file's path in the container."""
    cached = re.match(r"(.*/models--[^/]+)/snapshots/", model)
    folder = cached[1] if cached else posixpath.dirname(model)
    return folder, f"{MOUNTED_AT}/{posixpath.relpath(model, folder)}"


def _backend(placement: Placement) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    backends = {name.rstrip("0123456789") for name in placement.devices}
    if not backends:
        return "server", (), ()
    unknown = sorted(backends - set(_BACKENDS))
    if unknown or len(backends) > 1:
        names = ", ".join(placement.devices)
        raise UsageError(
            f"no published image of llama.cpp can use {names}"
            + (": they are built without RPC" if "RPC" in unknown else ""),
            hint="Use --format llama-server, which starts the program on this machine itself.",
        )
    backend = backends.pop()
    tag, flags = _BACKENDS[backend]
    return tag, flags, (_NOTES[backend],)


def _csv(field: str) -> str:
    """A field of --mount, which docker reads as a line of CSV."""
    if not set(field) & set(',"'):
        return field
    doubled = field.replace('"', '""')
    return f'"{doubled}"'
