"""`qnext synth`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qnext.cli.output import note, print_json, progress_bar


def synth(
    shape: Annotated[
        str,
        typer.Argument(metavar="SHAPE", help="demo, qwen3-next-80b-a3b, qwen3-30b-a3b, gpt-oss-20b, …"),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="File to write; it must not exist.")
    ],
    quant: Annotated[
        str, typer.Option("--quant", metavar="TYPE", help="File type: Q4_K_M, Q8_0, BF16, …")
    ] = "Q4_K_M",
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, metavar="N", help="So many layers instead of all.")
    ] = None,
    header_only: Annotated[
        bool,
        typer.Option("--header-only", metavar="", help="Full size but sparse, no weights: for planning."),
    ] = False,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the random weights.")] = 0,
    json_output: Annotated[
        bool, typer.Option("--json", metavar="", help="Print what was written as JSON.")
    ] = False,
) -> None:
    """Write a model file of true shape with random weights, to plan and measure without a download.

    Example: qnext synth qwen3-next-80b-a3b --quant Q4_K_M --layers 8 -o slice.gguf
    """
    from qnext.pipeline.synthesis import write_model
    from qnext.units import format_bytes

    with progress_bar(f"writing {output.name}") as progress:
        report = write_model(
            shape,
            output,
            quant=quant,
            layers=layers,
            header_only=header_only,
            seed=seed,
            on_progress=progress,
        )
    if json_output:
        print_json({"schema": "qnext.synth/1", **report})
        return
    size, seconds = int(report["file_bytes"]), int(report["elapsed_ns"]) / 1e9
    rate = "" if header_only else f", {size / 1e9 / seconds:.2f} GB/s"
    note(f"wrote {output}: {format_bytes(size)}, {report['tensors']} tensors in {seconds:.1f} s{rate}")
