"""The header reader and ggml agree: same type table, and no broken header passes here that ggml refuses.

ggml is asked in a child process, since a failed assertion of its own would end the process that asks.
"""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from qnext.errors import ModelError
from qnext.models.gguf_reader import read_header
from qnext.models.gguf_types import GGML_TYPES
from tests.gguf_writing import Tensor, build, sample_metadata, sample_tensors
from tests.unit.test_gguf_mutations import load_fuzzer

SPEC = importlib.util.find_spec("llama_cpp")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(SPEC is None, reason="llama-cpp-python is not installed"),
]

ASK_GGML = """
import ctypes, json, sys
from pathlib import Path

library, last_type, *files = sys.argv[1:]
ggml = ctypes.CDLL(library)
ggml.ggml_blck_size.restype = ctypes.c_int64
ggml.ggml_type_size.restype = ctypes.c_size_t
ggml.ggml_type_name.restype = ctypes.c_char_p
rows = [
    [kind, ggml.ggml_type_name(kind).decode().upper(), ggml.ggml_blck_size(kind), ggml.ggml_type_size(kind)]
    for kind in range(int(last_type) + 1)
]

class Params(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]

ggml.gguf_init_from_file.restype = ctypes.c_void_p
ggml.gguf_init_from_file.argtypes = [ctypes.c_char_p, Params]
accepted = [bool(ggml.gguf_init_from_file(name.encode(), Params(True, None))) for name in files]
print(json.dumps({"types": rows, "accepted": accepted}))
"""


def ask_ggml(files: list[Path]) -> tuple[list[list[object]], list[bool]]:
    """ggml's type table up to our last id, and for each file whether it takes the header."""
    assert SPEC is not None
    assert SPEC.origin is not None
    folder = Path(SPEC.origin).parent / "lib"
    library = next(p for p in sorted(folder.iterdir()) if p.stem in ("libggml-base", "ggml-base"))
    command = [sys.executable, "-c", ASK_GGML, str(library), str(max(GGML_TYPES)), *map(str, files)]
    child = subprocess.run(command, capture_output=True, timeout=100, check=True)
    answer = json.loads(child.stdout)
    return answer["types"], answer["accepted"]


def test_the_type_table_is_complete_and_that_of_ggml(tmp_path: Path) -> None:
    after_last = tmp_path / "newer.gguf"
    after_last.write_bytes(build({}, [Tensor("t", (256,), max(GGML_TYPES) + 1)]).data)
    types, accepted = ask_ggml([after_last])
    assert accepted == [False]
    assert [row for row in types if row[2]] == [  # removed types have blocks of 0
        [kind.id, kind.name, kind.block_size, kind.block_bytes] for kind in GGML_TYPES.values()
    ]


def test_what_ggml_refuses_is_refused(tmp_path: Path) -> None:
    base = build(sample_metadata(), sample_tensors())
    rng, fuzzer, files = random.Random(5), load_fuzzer(), []
    for number in range(400):
        files.append(tmp_path / f"{number}.gguf")
        files[-1].write_bytes(rng.choice(fuzzer.MUTATIONS)(rng, base))
    ours = []
    for path in files:
        try:
            read_header(path, check_data=False)
            ours.append(True)
        except ModelError:
            ours.append(False)
    _, accepted = ask_ggml(files)
    assert [p.name for p, we, ggml in zip(files, ours, accepted, strict=True) if we and not ggml] == []
    # the other way round only text that is no UTF-8 differs, which is rare
    assert sum(ggml and not we for we, ggml in zip(ours, accepted, strict=True)) < 20
    assert 100 < sum(accepted) < 300
