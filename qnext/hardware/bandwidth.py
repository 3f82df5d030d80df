"""RAM read bandwidth of this machine, measured in half a second.

Each usable core reads a buffer of its own, far larger than any cache, with numpy's SIMD maximum; the best
round counts, because on a busy machine noise only ever takes away.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from qnext.units import MIB

BUFFER_BYTES = 128 * MIB
_ROUNDS = 4


def measure_read_bandwidth(threads: int) -> int:
    """Bytes per second that `threads` threads read together."""
    import numpy

    buffers = [numpy.ones(BUFFER_BYTES // 4, dtype=numpy.float32) for _ in range(threads)]
    return max(_read_once(buffers, numpy.maximum.reduce) for _ in range(_ROUNDS))


def _read_once(buffers: list[Any], reduce: Any) -> int:
    gate = threading.Barrier(len(buffers) + 1)

    def read(buffer: Any) -> None:
        gate.wait()
        reduce(buffer)
        gate.wait()

    workers = [threading.Thread(target=read, args=(buffer,)) for buffer in buffers]
    for worker in workers:
        worker.start()
    gate.wait()
    began = time.perf_counter()
    gate.wait()
    elapsed = time.perf_counter() - began
    for worker in workers:
        worker.join()
    return round(len(buffers) * BUFFER_BYTES / elapsed)
