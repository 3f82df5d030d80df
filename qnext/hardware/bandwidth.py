"""RAM read bandwidth of this machine, measured in half a second.

Each core reads a buffer of its own with numpy's SIMD maximum, all at once; together the buffers are far
larger than any cache. The best round counts, because noise only ever takes away. It runs in a process of its
own, so that neither the buffers nor numpy stay with the command that asked.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from qnext.errors import HardwareError
from qnext.units import MIB

BUFFER_BYTES = 128 * MIB
TOTAL_BYTES = 1024 * MIB
"""Most memory taken by all buffers together."""
_ROUNDS = 5
_LIMIT_S = 60
_CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from qnext.hardware.bandwidth import measure_read_bandwidth
print(measure_read_bandwidth(int(sys.argv[2])))
"""


def measure_in_child(threads: int) -> int:
    """Bytes per second that `threads` threads read together. Raises HardwareError when it cannot be run."""
    root = str(Path(__file__).resolve().parents[2])
    argv = [sys.executable, "-P", "-c", _CHILD, root, str(threads)]
    try:
        ran = subprocess.run(argv, capture_output=True, text=True, timeout=_LIMIT_S, check=True)
        return int(ran.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise HardwareError(
            f"RAM bandwidth could not be measured: {error}", hint="Free some memory and try again."
        ) from error


def measure_read_bandwidth(threads: int) -> int:
    """Bytes per second that `threads` threads of this process read together."""
    import numpy

    size = min(BUFFER_BYTES, TOTAL_BYTES // threads)
    buffers = [numpy.ones(size // 4, dtype=numpy.float32) for _ in range(threads)]
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
    return round(sum(int(buffer.nbytes) for buffer in buffers) / elapsed)
