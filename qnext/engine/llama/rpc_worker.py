"""llama.cpp's RPC worker: lends this machine's CPU to an engine elsewhere as a device of type GPU.

Run as `python -m qnext.engine.llama.rpc_worker HOST PORT THREADS`. It serves until it is ended, and ends with
its parent: it watches its standard input, which closes when the parent dies. The protocol has no
authentication, so the caller decides what address it may bind.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading

from qnext.engine.llama import binding


def main() -> None:
    """Serve the CPU device. Returns, with an error on standard error, only when the port cannot be had."""
    host, port, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    binding.llama().llama_backend_init()
    cpu = next(device for device in binding.list_devices() if device.kind == "host")
    devices = (ctypes.c_void_p * 1)(cpu.handle)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    binding.ggml("ggml_backend_rpc_start_server")(f"{host}:{port}".encode(), None, threads, 1, devices)
    os._exit(1)  # the other thread holds standard input, which a regular exit would trip over


def _end_with_parent() -> None:
    while sys.stdin.buffer.read(4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
