"""The bundled libraries as the engine child loads them."""

import subprocess
import sys
from collections import Counter

import pytest

pytestmark = pytest.mark.engine

_PROGRAM = """
from qnext.engine.llama import binding
binding.llama().llama_backend_init()
binding.list_devices()
binding.buffer_types()
binding.free_threadpool(binding.new_threadpool(1))
print(*{line.split()[-1] for line in open("/proc/self/maps") if "/libggml" in line or "/libllama" in line})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_every_library_is_loaded_once() -> None:
    """Two copies of libggml would mean two device registries, and buffer types the engine does not know."""
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    stems = Counter(path.rsplit("/", 1)[-1].split(".so")[0] for path in done.stdout.split())
    assert stems["libggml"] == 1
    assert max(stems.values()) == 1, stems
