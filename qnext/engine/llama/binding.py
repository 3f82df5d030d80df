"""llama.cpp's libraries as ctypes sees them: the bindings of llama-cpp-python plus the ggml calls they lack.

The `llama_cpp` package imports numpy, Jinja and its high-level classes on import, 0.2 s and 25 MB that a dry
run does not need. Only its low-level module is wanted here, so the package object is put in place without
running its `__init__`.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import sys
import types
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

DEVICE_KINDS = {0: "host", 1: "gpu", 2: "igpu", 3: "accel"}
"""ggml_backend_dev_type by value."""


class EngineFailure(Exception):
    """The engine said no without dying. `kind` is for programs, the text for people.

    `missing`: llama-cpp-python or a part of it is not installed. `device`: it has no such device or buffer
    type. The other kinds are those of `qnext.engine.llama.runtime`.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class EngineDevice:
    """A device as ggml reports it. Memory may be nonsense (0, or Vulkan's absurd totals): judge it above.

    `pci_bus_id` is ggml's device id, which is one for PCI cards: `0000:01:00.0`.
    """

    name: str
    description: str
    kind: str
    free_bytes: int
    total_bytes: int
    pci_bus_id: str | None
    buffer_type: str
    host_buffer_type: str | None
    handle: int


@cache
def llama() -> Any:
    """The low-level binding module `llama_cpp.llama_cpp`. Raises EngineFailure."""
    if "llama_cpp" not in sys.modules:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.submodule_search_locations is None:
            raise EngineFailure("missing", "llama-cpp-python is not installed")
        package = types.ModuleType("llama_cpp")
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules["llama_cpp"] = package
    return importlib.import_module("llama_cpp.llama_cpp")


def library_folder() -> Path:
    """Folder of the bundled shared libraries."""
    return Path(llama().__file__).parent / "lib"


@cache
def _library(name: str) -> ctypes.CDLL:
    """One bundled ggml library by its stem, the copy that libllama itself has loaded.

    A wheel holds no links: `libggml.so` and `libggml.so.0` are two files, libllama asks for the second, and
    opening the first would load it again with a device registry of its own.
    """
    if name == "llama":
        own: ctypes.CDLL = llama()._lib
        return own
    for pattern in (f"lib{name}.so.0", f"lib{name}.so", f"lib{name}.dylib", f"{name}.dll"):
        path = library_folder() / pattern
        if path.exists():
            return ctypes.CDLL(str(path))
    raise EngineFailure("missing", f"this engine build has no {name}")


class InitParams(ctypes.Structure):
    """`struct ggml_init_params` of ggml.h."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class BufferInterface(ctypes.Structure):
    """`struct ggml_backend_buffer_i` of ggml-backend-impl.h: eleven functions."""

    _fields_ = (("functions", ctypes.c_void_p * 11),)


_COPY = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
"""Tensor, host memory, offset in the tensor, bytes."""

_SIGNATURES: dict[str, tuple[str, Any, list[Any]]] = {
    # function: (library, result, arguments) — from ggml-backend.h, ggml-cpu.h,
    # ggml-alloc.h, ggml.h and ggml-rpc.h
    "ggml_backend_dev_count": ("ggml", ctypes.c_size_t, []),
    "ggml_backend_dev_get": ("ggml", ctypes.c_void_p, [ctypes.c_size_t]),
    "ggml_backend_dev_by_name": ("ggml", ctypes.c_void_p, [ctypes.c_char_p]),
    "ggml_backend_register": ("ggml", None, [ctypes.c_void_p]),
    "ggml_backend_dev_get_props": ("ggml-base", None, [ctypes.c_void_p, ctypes.c_void_p]),
    "ggml_backend_dev_buffer_type": ("ggml-base", ctypes.c_void_p, [ctypes.c_void_p]),
    "ggml_backend_dev_host_buffer_type": ("ggml-base", ctypes.c_void_p, [ctypes.c_void_p]),
    "ggml_backend_dev_backend_reg": ("ggml-base", ctypes.c_void_p, [ctypes.c_void_p]),
    "ggml_backend_reg_get_proc_address": ("ggml-base", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]),
    "ggml_backend_buft_name": ("ggml-base", ctypes.c_char_p, [ctypes.c_void_p]),
    "ggml_backend_buft_alloc_buffer": ("ggml-base", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t]),
    "ggml_backend_buffer_get_base": ("ggml-base", ctypes.c_void_p, [ctypes.c_void_p]),
    "ggml_backend_buffer_get_type": ("ggml-base", ctypes.c_void_p, [ctypes.c_void_p]),
    "ggml_backend_buffer_free": ("ggml-base", None, [ctypes.c_void_p]),
    "ggml_backend_buffer_init": (
        "ggml-base",
        ctypes.c_void_p,
        [ctypes.c_void_p, BufferInterface, ctypes.c_void_p, ctypes.c_size_t],
    ),
    "ggml_backend_sched_get_n_backends": ("ggml-base", ctypes.c_int, [ctypes.c_void_p]),
    "ggml_backend_sched_get_backend": ("ggml-base", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int]),
    "ggml_backend_sched_get_buffer_type": ("ggml-base", ctypes.c_void_p, [ctypes.c_void_p] * 2),
    "ggml_backend_sched_get_buffer_size": ("ggml-base", ctypes.c_size_t, [ctypes.c_void_p] * 2),
    "ggml_backend_alloc_ctx_tensors_from_buft": (
        "ggml-base",
        ctypes.c_void_p,
        [ctypes.c_void_p, ctypes.c_void_p],
    ),
    "ggml_backend_tensor_set": ("ggml-base", None, _COPY),
    "ggml_backend_tensor_get": ("ggml-base", None, _COPY),
    "ggml_init": ("ggml-base", ctypes.c_void_p, [InitParams]),
    "ggml_free": ("ggml-base", None, [ctypes.c_void_p]),
    "ggml_new_tensor_1d": ("ggml-base", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]),
    "ggml_backend_rpc_add_server": ("ggml-rpc", ctypes.c_void_p, [ctypes.c_char_p]),
    "ggml_backend_rpc_start_server": (
        "ggml-rpc",
        None,
        [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p],
    ),
    "ggml_threadpool_new": ("ggml-cpu", ctypes.c_void_p, [ctypes.c_void_p]),
    "ggml_threadpool_free": ("ggml-cpu", None, [ctypes.c_void_p]),
    "llama_attach_threadpool": ("llama", None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]),
}


@cache
def ggml(function: str) -> Any:
    """One ggml function with its C signature set."""
    library, result, arguments = _SIGNATURES[function]
    address = getattr(_library(library), function)
    address.restype = result
    address.argtypes = arguments
    return address


@cache
def _get_logits() -> Any:
    """llama_get_logits with its result as a number: a pointer object per step is not needed."""
    return ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(("llama_get_logits", llama()._lib))


def logits_address(context: Any) -> int | None:
    """Where the logits of the last llama_decode lie, once they have been computed."""
    address: int | None = _get_logits()(context)
    return address


def add_rpc_servers(endpoints: tuple[str, ...]) -> None:
    """Register each `host:port` so that it shows up as device `RPC<i>`. Raises EngineFailure.

    A worker that does not answer ends the process: the parent explains that.
    """
    for endpoint in endpoints:
        if endpoint in _registered:
            continue
        registry = ggml("ggml_backend_rpc_add_server")(endpoint.encode())
        if not registry:
            raise EngineFailure("device", f"RPC worker {endpoint} offers no device")
        ggml("ggml_backend_register")(registry)
        _registered.add(endpoint)


_registered: set[str] = set()
"""Endpoints added so far; a second time would list their devices twice."""


class _DeviceProperties(ctypes.Structure):
    """`struct ggml_backend_dev_props` of ggml-backend.h, its five capabilities as one array."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("memory_free", ctypes.c_size_t),
        ("memory_total", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("device_id", ctypes.c_char_p),
        ("caps", ctypes.c_bool * 5),
    )


def list_devices() -> list[EngineDevice]:
    """Every device ggml knows, in its order (the order of `CUDA0`, `CUDA1`, …)."""
    devices = []
    for index in range(ggml("ggml_backend_dev_count")()):
        handle = ggml("ggml_backend_dev_get")(index)
        told = _DeviceProperties()
        ggml("ggml_backend_dev_get_props")(handle, ctypes.byref(told))
        host_type = ggml("ggml_backend_dev_host_buffer_type")(handle)
        devices.append(
            EngineDevice(
                name=told.name.decode(),
                description=(told.description or b"").decode(errors="replace").strip(),
                kind=DEVICE_KINDS.get(told.type, "other"),
                free_bytes=told.memory_free,
                total_bytes=told.memory_total,
                pci_bus_id=told.device_id.decode(errors="replace") if told.device_id else None,
                buffer_type=buffer_type_name(ggml("ggml_backend_dev_buffer_type")(handle)),
                host_buffer_type=buffer_type_name(host_type) if host_type else None,
                handle=handle,
            )
        )
    return devices


def buffer_type_name(buffer_type: int) -> str:
    """Name ggml gives a buffer type: `CPU`, `CUDA0`, `CUDA_Host`, `CPU_REPACK`, `RPC0[host:port]`."""
    name: bytes = ggml("ggml_backend_buft_name")(buffer_type)
    return name.decode()


def buffer_types() -> dict[str, int]:
    """Every buffer type a tensor override may name, by name: device, pinned host and extra CPU types."""
    found: dict[str, int] = {}
    for device in list_devices():
        for getter in ("ggml_backend_dev_buffer_type", "ggml_backend_dev_host_buffer_type"):
            buffer_type = ggml(getter)(device.handle)
            if buffer_type:
                found.setdefault(buffer_type_name(buffer_type), buffer_type)
        if device.kind == "host":
            found.update(_extra_buffer_types(device.handle))
    return found


def _extra_buffer_types(device: int) -> dict[str, int]:
    """`CPU_REPACK`, `AMX` and the like: only the backend registry can name them (NULL-terminated array)."""
    registry = ggml("ggml_backend_dev_backend_reg")(device)
    address = ggml("ggml_backend_reg_get_proc_address")(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return {}
    getter = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
    array = getter(device)
    found: dict[str, int] = {}
    index = 0
    while array and array[index]:
        found[buffer_type_name(array[index])] = array[index]
        index += 1
    return found


class _ThreadpoolParams(ctypes.Structure):
    """`struct ggml_threadpool_params` of ggml.h (GGML_MAX_N_THREADS = 512)."""

    _fields_ = (
        ("cpumask", ctypes.c_bool * 512),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    )


def new_threadpool(threads: int) -> int:
    """A persistent pool with llama-bench's settings (poll 50, normal priority). Free with free_threadpool."""
    parameters = _ThreadpoolParams(n_threads=threads, prio=0, poll=50, strict_cpu=False, paused=False)
    pool: int = ggml("ggml_threadpool_new")(ctypes.byref(parameters))
    return pool


def free_threadpool(pool: int) -> None:
    """Free a pool of `new_threadpool`, after the context that used it."""
    ggml("ggml_threadpool_free")(pool)
