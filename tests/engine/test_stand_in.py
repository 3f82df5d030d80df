"""A file that stands in for one that is not here gives llama.cpp's dry run the same memory, to the byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qnext.engine.session import EngineSession
from qnext.models.gguf_reader import read_header
from qnext.models.synth import synthesise
from qnext.models.synth.stand_in import write_stand_in
from qnext.plan.values import Placement

pytestmark = pytest.mark.engine

TINY = ("tiny-qwen3next", "tiny-qwen3moe", "tiny-gpt-oss", "tiny-qwen3")
PLACEMENTS = (Placement(context=2048), Placement(context=4096, ubatch=128, kv_type_k="q8_0", parallel=2))


def test_a_dry_run_cannot_tell_the_stand_in_from_the_model(tmp_path: Path) -> None:
    with EngineSession() as session:
        for name in TINY:
            path, twin = tmp_path / f"{name}.gguf", tmp_path / "stand-ins" / f"{name}.gguf"
            synthesise(name, path, quant="Q8_0", header_only=True)
            write_stand_in(read_header(path), twin)
            write_stand_in(read_header(path), twin)  # a second time changes nothing
            for placement in PLACEMENTS:
                placement = replace(placement, threads=1, threads_batch=1)
                real, stood = (session.dry_run(str(file), placement) for file in (path, twin))
                assert real == stood and any(size.part == "compute" for size in real), name
            assert twin.stat().st_blocks * 512 < 1 << 20
