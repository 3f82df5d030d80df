"""llama-bench's Markdown table, for pasting: who reads such tables finds every column where it always is.

Shown are model, size, parameters, backend, the threads or the GPU layers, every other field that is not
llama-bench's default in some row, the test and its mean speed with the standard deviation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_DEFAULTS: dict[str, tuple[object, ...]] = {
    "n_cpu_moe": (0,),
    "cpu_mask": ("0x0",),
    "cpu_strict": (False,),
    "poll": (50,),
    "n_batch": (2048,),
    "n_ubatch": (512,),
    "type_k": ("f16",),
    "type_v": ("f16",),
    "main_gpu": (0,),
    "split_mode": ("layer",),
    "no_kv_offload": (False,),
    "flash_attn": (-1,),
    "devices": ("auto", "none"),
    "tensor_split": ("0.00",),
    "tensor_buft_overrides": ("none",),
    "load_mode": ("auto",),
    "lazy_mode": ("auto",),
    "embeddings": (False,),
    "no_op_offload": (0,),
    "no_host": (False,),
    "repack": (True,),
    "fit_target": (0,),
    "fit_min_ctx": (0,),
}
"""Fields in the order of the columns, with the values that are not worth one (`cmd_params_defaults`)."""

_SHORT = {
    "n_gpu_layers": "ngl",
    "n_threads": "threads",
    "split_mode": "sm",
    "no_kv_offload": "nkvo",
    "flash_attn": "fa",
    "load_mode": "lm",
    "embeddings": "embd",
    "no_op_offload": "nopo",
    "no_host": "noh",
    "repack": "rpk",
    "devices": "dev",
    "tensor_split": "ts",
    "tensor_buft_overrides": "ot",
    "fit_target": "fitt",
    "fit_min_ctx": "fitc",
}
"""llama-bench's headings where they are not the field's name."""

_LEFT = frozenset({"model", "backend", "devices", "tensor_split", "tensor_buft_overrides", "cpu_mask"})
_GPU_FREE = ("CPU", "BLAS", "ZenDNN")


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """The table with a line `build: COMMIT (NUMBER)` per build below; empty for no rows."""
    if not rows:
        return ""
    columns = ["model", "size", "params", "backend", *_configuration_columns(rows), "test", "t/s"]
    cells = [[_SHORT.get(name, name) for name in columns]]
    cells += [[_cell(row, name) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "| "
        + " | ".join(
            text.ljust(width) if name in _LEFT else text.rjust(width)
            for text, width, name in zip(line, widths, columns, strict=True)
        )
        + " |"
        for line in cells
    ]
    rule = (
        "-" * (width - 1) + ("-" if name in _LEFT else ":")
        for width, name in zip(widths, columns, strict=True)
    )
    lines.insert(1, "| " + " | ".join(rule) + " |")
    builds = dict.fromkeys((row.get("build_commit"), row.get("build_number")) for row in rows)
    ends = [f"build: {commit} ({number})" for commit, number in builds]
    return "\n".join([*lines, "", *ends]) + "\n"


def _configuration_columns(rows: Sequence[Mapping[str, object]]) -> list[str]:
    on_cpu = [any(name in str(row.get("backends")) for name in _GPU_FREE) for row in rows]
    found = [] if all(on_cpu) else ["n_gpu_layers"]
    moved = [name for name in _DEFAULTS if any(row.get(name) not in (*_DEFAULTS[name], None) for row in rows)]
    if "n_cpu_moe" in moved:
        found.append("n_cpu_moe")
    if any(on_cpu) or len({row.get("n_threads") for row in rows}) > 1:
        found.append("n_threads")
    return [*found, *(name for name in moved if name != "n_cpu_moe")]


def test_name(prompt: object, generate: object, depth: object) -> str:
    """`pp512`, `tg128 @ d4096`, `pp512+tg128`."""
    parts = [f"{word}{count}" for word, count in (("pp", prompt), ("tg", generate)) if count]
    return "+".join(parts) + (f" @ d{depth}" if depth else "")


def _cell(row: Mapping[str, object], name: str) -> str:
    if name == "model":
        text = str(row.get("model_type") or row.get("model_filename") or "")
    elif name == "size":
        text = _scaled(row.get("model_size"), 1 << 20, 1 << 30, "MiB", "GiB")
    elif name == "params":
        text = _scaled(row.get("model_n_params"), 1_000_000, 1_000_000_000, "M", "B")
    elif name == "backend":
        text = str(row.get("backends") or "")
    elif name == "test":
        text = test_name(row.get("n_prompt"), row.get("n_gen"), row.get("n_depth"))
    elif name == "t/s":
        text = f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}"
    else:
        value = row.get(name)
        text = "" if value is None else str(int(value)) if isinstance(value, bool) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _scaled(count: object, small: int, large: int, small_unit: str, large_unit: str) -> str:
    if not isinstance(count, int):
        return ""
    unit, size = (large_unit, large) if count >= large else (small_unit, small)
    return f"{count / size:.2f} {unit}"
