"""Flags that several commands share, declared once, with llama.cpp's names where it has them.

`takes_plan_flags` gives a command all fields of `PlanFlags` as options and hands them over as one value.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_type_hints

import typer

from qnext.cli.verbose import Verbose

MODEL_HELP = "demo, a GGUF file, a repository (user/repo or user/repo:QUANT), or a name from the catalogue."

_MACHINE, _PLACE, _SIZE = "Machine", "What goes where", "Context and threads"
_QUANT = "Choice of quant"
MOST_SEQUENCES = 256
"""llama.cpp's LLAMA_MAX_SEQ."""


Tuned = Annotated[
    bool,
    typer.Option(
        "--tuned/--no-tuned",
        help="Take what qnext bench sweep found, if there is any.",
        rich_help_panel=_PLACE,
    ),
]
"""Type of the parameter `tuned` of commands that run a model."""


@dataclass(frozen=True, slots=True)
class PlanFlags:
    """What the command line says about machine, placement and sizes; None leaves it to the planner."""

    prefer: Annotated[
        str,
        typer.Option(
            "--prefer",
            metavar="quality|balanced|speed",
            help="Which quant, where MODEL leaves it open; quality also keeps the cache in f16.",
            rich_help_panel=_QUANT,
        ),
    ] = "balanced"
    min_tps: Annotated[
        float | None,
        typer.Option(
            "--min-tps",
            min=0,
            metavar="T/S",
            help="The slowest answer to put up with: a smaller quant is taken instead.",
            rich_help_panel=_QUANT,
        ),
    ] = None
    context: Annotated[
        int | None,
        typer.Option(
            "-c",
            "--ctx-size",
            min=1,
            metavar="TOKENS",
            help="Longest conversation, over all slots together.",
            rich_help_panel=_SIZE,
        ),
    ] = None
    parallel: Annotated[
        str,
        typer.Option(
            "-np",
            "--parallel",
            metavar="N|auto",
            help="Slots: conversations at the same time; auto: as many as cost a single one nothing.",
            rich_help_panel=_SIZE,
        ),
    ] = "1"
    cache_type_k: Annotated[
        str | None,
        typer.Option(
            "-ctk",
            "--cache-type-k",
            metavar="TYPE",
            help="Precision of the KV cache's keys: f16, or q8_0 at half the size; chosen if not said.",
            rich_help_panel=_SIZE,
        ),
    ] = None
    cache_type_v: Annotated[
        str | None,
        typer.Option(
            "-ctv",
            "--cache-type-v",
            metavar="TYPE",
            help="The same of its values.",
            rich_help_panel=_SIZE,
        ),
    ] = None
    flash_attention: Annotated[
        str,
        typer.Option(
            "-fa",
            "--flash-attn",
            metavar="on|off|auto",
            help="Flash attention: less memory, needed for a q8_0 cache.",
            rich_help_panel=_SIZE,
        ),
    ] = "on"
    batch: Annotated[
        int,
        typer.Option(
            "-b",
            "--batch-size",
            min=1,
            metavar="N",
            help="Prompt tokens given to the engine at once.",
            rich_help_panel=_SIZE,
        ),
    ] = 2048
    ubatch: Annotated[
        int | None,
        typer.Option(
            "-ub",
            "--ubatch-size",
            "--ubatch",
            min=1,
            metavar="N",
            help="Prompt tokens computed at once: more is faster and takes memory.",
            rich_help_panel=_SIZE,
        ),
    ] = None
    threads: Annotated[
        int | None,
        typer.Option(
            "-t",
            "--threads",
            min=1,
            max=512,
            metavar="N",
            help="CPU threads for decode.",
            rich_help_panel=_SIZE,
        ),
    ] = None
    threads_batch: Annotated[
        int | None,
        typer.Option(
            "-tb",
            "--threads-batch",
            min=1,
            max=512,
            metavar="N",
            help="CPU threads for prefill.",
            rich_help_panel=_SIZE,
        ),
    ] = None
    hardware: Annotated[
        str | None,
        typer.Option(
            "--hardware",
            metavar="NAME|FILE",
            help="Plan for another machine: see qnext profile list.",
            rich_help_panel=_MACHINE,
        ),
    ] = None
    ram: Annotated[
        str | None,
        typer.Option("--ram", metavar="SIZE", help="RAM to use at most: 24G.", rich_help_panel=_MACHINE),
    ] = None
    vram: Annotated[
        str | None,
        typer.Option(
            "--vram", metavar="SIZE", help="Memory to use at most on each GPU.", rich_help_panel=_MACHINE
        ),
    ] = None
    ram_headroom: Annotated[
        str | None,
        typer.Option(
            "--ram-headroom",
            metavar="SIZE",
            help="RAM to leave free of what there is; usually a sixteenth, at most 1G.",
            rich_help_panel=_MACHINE,
        ),
    ] = None
    vram_headroom: Annotated[
        str | None,
        typer.Option(
            "--vram-headroom", metavar="SIZE", help="The same on each GPU.", rich_help_panel=_MACHINE
        ),
    ] = None
    device_memory: Annotated[
        list[str] | None,
        typer.Option(
            "--device-memory",
            metavar="NAME=SIZE",
            help="The same for one device: CUDA0=14G. May be repeated.",
            rich_help_panel=_MACHINE,
        ),
    ] = None
    rpc: Annotated[
        str | None,
        typer.Option(
            "--rpc",
            metavar="HOST:PORT,…",
            help="Other machines that run qnext worker; each needs --device-memory RPC0=SIZE.",
            rich_help_panel=_MACHINE,
        ),
    ] = None
    gpu_layers: Annotated[
        int | None,
        typer.Option(
            "-ngl",
            "--gpu-layers",
            "--n-gpu-layers",
            min=0,
            metavar="N",
            help="Layers on the GPU.",
            rich_help_panel=_PLACE,
        ),
    ] = None
    cpu_moe: Annotated[
        bool,
        typer.Option(
            "-cmoe", "--cpu-moe", metavar="", help="All routed experts in RAM.", rich_help_panel=_PLACE
        ),
    ] = False
    n_cpu_moe: Annotated[
        int | None,
        typer.Option(
            "-ncmoe",
            "--n-cpu-moe",
            min=0,
            metavar="N",
            help="Routed experts of the first N layers in RAM.",
            rich_help_panel=_PLACE,
        ),
    ] = None
    override_tensor: Annotated[
        list[str] | None,
        typer.Option(
            "-ot",
            "--override-tensor",
            metavar="REGEX=BUFFER,…",
            help="Tensors whose name matches go to that buffer: 'exps=CPU'.",
            rich_help_panel=_PLACE,
        ),
    ] = None
    tensor_split: Annotated[
        str | None,
        typer.Option(
            "-ts",
            "--tensor-split",
            metavar="A,B,…",
            help="Share of the layers per GPU: 3,1.",
            rich_help_panel=_PLACE,
        ),
    ] = None
    load_mode: Annotated[
        str,
        typer.Option(
            "-lm",
            "--load-mode",
            metavar="MODE",
            help="How the file gets into memory: none (read), mmap, mlock, mmap+mlock, dio.",
            rich_help_panel=_PLACE,
        ),
    ] = "none"
    repack: Annotated[
        str,
        typer.Option(
            "--repack",
            metavar="LAYOUT",
            help="Weights rearranged for this CPU: auto, full, experts or off.",
            rich_help_panel=_PLACE,
        ),
    ] = "auto"
    verbose: Verbose = False


def takes_plan_flags(command: Callable[..., int | None]) -> Callable[..., int | None]:
    """Give `command`, whose parameter `flags` is a PlanFlags, the options of that class.

    An option that the command declares itself under the same name takes that one's place.
    """
    hints = get_type_hints(PlanFlags, include_extras=True)
    own = [
        parameter.replace(annotation=get_type_hints(command, include_extras=True)[name])
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "flags"
    ]
    shared = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(PlanFlags)
        if field.name not in {parameter.name for parameter in own}
    ]

    @functools.wraps(command)
    def wrapper(**given: Any) -> int | None:
        flags = PlanFlags(**{parameter.name: given.pop(parameter.name) for parameter in shared})
        return command(**given, flags=flags)

    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own] + shared
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper
