"""The trip of `qnext synth`: a generated model file, quantised by ggml where needed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qnext.engine.build import installed_build
from qnext.engine.llama.quantize import quantise_rows
from qnext.errors import ModelError, UsageError
from qnext.models.gguf_reader import read_header
from qnext.models.synth import make_demo
from qnext.models.synth.synthesise import synthesise


def write_model(
    shape: str,
    output: Path,
    *,
    quant: str,
    layers: int | None,
    header_only: bool,
    seed: int,
    on_progress: Callable[[float], None],
) -> dict[str, Any]:
    """Write `shape` (or `demo`) to `output`, which must not exist; returns what was written."""
    if shape == "demo":
        if layers is not None or header_only:
            raise UsageError(
                "the demo has one size only", hint="Leave out --layers and --header-only, or: tiny-qwen3next"
            )
        if output.exists():
            raise ModelError(f"{output} exists already", hint="Choose another -o, or delete it first.")
        began = time.perf_counter_ns()
        make_demo(output)
        return {
            "path": str(output),
            "shape": "demo",
            "tensors": len(read_header(output).tensors),
            "file_bytes": output.stat().st_size,
            "elapsed_ns": time.perf_counter_ns() - began,
        }
    report = synthesise(
        shape,
        output,
        quant=quant,
        layers=layers,
        header_only=header_only,
        quantizer=None if header_only or installed_build() is None else quantise_rows,
        progress=lambda done, total: on_progress(done / total if total else 1.0),
        seed=seed,
    )
    return {**asdict(report), "path": str(report.path)}
