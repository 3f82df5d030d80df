"""A true-shape slice of Qwen3-Next-80B-A3B (Q4_K_M, random weights), made for the occasion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from claims import ROOT, CannotMeasure

MODEL, QUANT = "qwen3-next-80b-a3b", "Q4_K_M"
_LAYER_BYTES, _REST_BYTES = 1 << 30, 3 << 30
"""What a layer takes, and all that is no layer: embedding, head, context, the programs."""


@contextmanager
def true_slice(layers: int, *, copies: int = 2) -> Iterator[tuple[Path, Path]]:
    """(file, a private QNEXT_HOME), both gone afterwards.

    `copies` is how often the model is in memory at once, the page cache's copy counted. A file kept in
    QNEXT_CLAIMS_SLICES (a folder) is used again and left there. Raises CannotMeasure where RAM or disk lack.
    """
    from qnext.hardware import detect_machine

    machine = detect_machine(Path(tempfile.gettempdir()))
    size = layers * _LAYER_BYTES + _REST_BYTES
    for have, need, what in (
        (machine.memory.usable_bytes, copies * size, "free memory"),
        (machine.disk.free_bytes, size, "free disk in the temporary folder"),
    ):
        if have is not None and have < need:
            raise CannotMeasure(f"needs {need >> 30} GiB of {what}")
    with tempfile.TemporaryDirectory(prefix="qnext-claims-") as folder:
        home = Path(folder)
        model = Path(os.environ.get("QNEXT_CLAIMS_SLICES", folder)) / f"{MODEL}-{layers}.gguf"
        if not model.exists():
            arguments = (MODEL, "--quant", QUANT, "--layers", str(layers), "-o", str(model))
            run_qnext(("synth", *arguments), home)
        yield model, home


def run_qnext(arguments: tuple[str, ...], home: Path) -> str:
    """Standard output of `qnext ARGUMENTS`. Raises CalledProcessError."""
    argv = [sys.executable, "-m", "qnext", *arguments]
    environment = {**os.environ, "QNEXT_HOME": str(home)}
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True, env=environment).stdout


def safe_layout(home: Path) -> str:
    """The weight layout that the probe allows here: llama-bench crashes with AMX buffers on some CPUs."""
    run_qnext(("plan", "demo", "--json"), home)
    entries = list((home / "cache" / "probes").glob("layout-*.json"))
    return str(json.loads(entries[0].read_text())["policy"])


def peer(name: str) -> Path:
    """A llama.cpp program built by `scripts/peers`. Raises CannotMeasure where it cannot be built."""
    done = subprocess.run(
        [str(ROOT / "scripts" / "peers")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    paths = [Path(line) for line in done.stdout.splitlines() if Path(line).name == name]
    if done.returncode or not paths:
        raise CannotMeasure(f"needs {name}: run scripts/peers")
    return paths[0]


def wheel_libraries() -> dict[str, str]:
    """Environment in which a peer loads the wheel's libraries; its own, built apart, are 2 % slower."""
    from importlib.util import find_spec

    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise CannotMeasure("llama-cpp-python is not installed")
    return {"LD_LIBRARY_PATH": str(Path(spec.origin).parent / "lib")}
