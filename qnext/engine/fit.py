"""llama.cpp's own answer to the same question: `common_fit_params`, through its program llama-fit-params.

The function lives in llama.cpp's `common`, which the Python package does not carry; the program is one of
the peers that scripts/peers builds. It sizes every layout it tries from metadata, without weights, and
prints the flags it would start with. It fills the devices and takes the host's memory for endless (fit.h:
"assumes system memory is unlimited"), so its answer is counted with qnext's arithmetic afterwards.

The devices' budgets are put to it as margins (`--fit-target`, whole MiB) below the memory it sees free, so
that both plan with the same room, but for up to 2 MiB less for it: what it sees free is printed cut to whole
MiB. It fits only what is unset: context, batches and cache types are given as planned.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qnext.errors import EngineError, UsageError
from qnext.models.header import ModelHeader
from qnext.models.shape import is_expert, layer_of
from qnext.plan.placement import ALL_LAYERS
from qnext.plan.values import HOST, Budget, Override, Placement
from qnext.units import MIB, format_bytes

PROGRAM = "llama-fit-params"
_LIST_LIMIT_S = 60.0
_FIT_LIMIT_S = 300.0
_DEVICE = re.compile(r"^ {2}(\S+): .* \((\d+) MiB, (\d+) MiB free\)\s*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class FitAnswer:
    """What llama-fit-params printed: `flags` as words, empty where it found no layout (`error`)."""

    flags: tuple[str, ...]
    seconds: float
    error: str = ""


def find_fit_program(cache_dir: Path, environ: Mapping[str, str] | None = None) -> Path:
    """llama-fit-params on PATH, else the newest that scripts/peers built. Raises EngineError."""
    environ = os.environ if environ is None else environ
    on_path = shutil.which(PROGRAM, path=environ.get("PATH", os.defpath))
    if on_path:
        return Path(on_path)
    built = [path for path in cache_dir.glob(f"peers/*/build/bin/{PROGRAM}") if path.is_file()]
    if built:
        return max(built, key=lambda path: path.stat().st_mtime)
    raise EngineError(
        f"{PROGRAM}, llama.cpp's own planner, is not here",
        hint="Build it with scripts/peers in qnext's checkout, or put llama.cpp's programs on PATH.",
    )


def run_fit(program: Path, model: str, placement: Placement, budgets: Sequence[Budget]) -> FitAnswer:
    """Ask llama.cpp to place `model` with the context, batches and cache of `placement` inside `budgets`.

    The program knows no `--kv-unified`: its sequences are apart, as qnext plans them. `budgets` are the
    host's, which it ignores, and those of the devices, which must be here. Raises
    EngineError for a program that cannot be asked, UsageError for devices it does not see or a budget above
    their memory.
    """
    devices = [budget for budget in budgets if budget.name != HOST and budget.budget_bytes > 0]
    remote = ["--rpc", ",".join(placement.rpc_servers)] if placement.rpc_servers else []
    margins = (
        _margins(_ask([str(program), *remote, "--list-devices"], _LIST_LIMIT_S), devices) if devices else []
    )
    argv = [str(program), "-m", model, *remote]
    argv += ["--device", ",".join(budget.name for budget in devices) or "none"]
    if margins:
        argv += ["--fit-target", ",".join(map(str, margins))]
    argv += ["-c", str(placement.context), "-b", str(placement.batch), "-ub", str(placement.ubatch)]
    argv += ["-ctk", placement.kv_type_k, "-ctv", placement.kv_type_v, "-fa", placement.flash_attention]
    argv += ["-np", str(placement.parallel), "--load-mode", placement.load_mode]
    argv += ["-t", str(placement.threads), "-tb", str(placement.threads_batch)]
    argv.append("--repack" if placement.extra_buffers else "--no-repack")
    argv += [] if placement.kv_offload else ["--no-kv-offload"]
    argv += [] if placement.op_offload else ["--no-op-offload"]
    argv += ["--swa-full"] if placement.swa_full else []
    started = time.monotonic()
    ran = _ask(argv, _FIT_LIMIT_S)
    seconds = time.monotonic() - started
    line = next((line for line in reversed(ran.stdout.splitlines()) if line.startswith("-c ")), None)
    if line is None:
        said = [text.strip() for text in ran.stderr.splitlines() if text.strip()]
        if any("failed to fit" in text for text in said):
            return FitAnswer((), seconds, "it found no layout that leaves the memory asked for free")
        reason = said[-1] if said else f"it ended with status {ran.returncode}"
        raise EngineError(
            f"{PROGRAM} gave no answer: {reason}", hint="Use the one that scripts/peers builds."
        )
    return FitAnswer(tuple(shlex.split(line, posix=False)), seconds)


def read_fit(answer: FitAnswer, base: Placement, header: ModelHeader, devices: Sequence[str]) -> Placement:
    """The placement that an answer's flags describe. `base` has the settings that were given to it.

    `devices` are all those it was given, in order. Raises EngineError for a flag it did not print before.
    """
    words = iter(answer.flags)
    placement = replace(base, devices=tuple(devices), tensor_split=None, overrides=(), cpu_expert_layers=())
    for flag in words:
        value = next(words, "").strip('"')
        try:
            if flag == "-c":
                placement = replace(placement, context=int(value))
            elif flag == "-ngl":
                layers = int(value)
                placement = replace(placement, n_gpu_layers=ALL_LAYERS if layers < 0 else layers)
            elif flag == "-ts":
                shares = [float(share) for share in value.split(",")]
                shares += [0.0] * (len(devices) - len(shares))
                placement = replace(placement, tensor_split=tuple(shares))
            elif flag == "-ot":
                placement = replace(placement, overrides=_overrides(value))
            else:
                raise ValueError
        except ValueError as error:
            raise EngineError(
                f"{PROGRAM} printed what this version of qnext does not know: {flag} {value}",
                hint="Use the one that scripts/peers builds.",
            ) from error
    moved = tuple(sorted(_expert_layers_on_host(header, placement.overrides)))
    if not devices or placement.n_gpu_layers == 0:
        return replace(placement, devices=(), n_gpu_layers=0, tensor_split=None, cpu_expert_layers=())
    return replace(placement, cpu_expert_layers=moved)


def _margins(ran: subprocess.CompletedProcess[str], devices: Sequence[Budget]) -> list[int]:
    """MiB to leave free on each device, so that what is left is at most its budget.

    A device printed with n MiB free has up to a MiB more, which the margin takes away.
    """
    free = {name: int(size) for name, _, size in _DEVICE.findall(ran.stdout)}
    margins = []
    for device in devices:
        if device.name not in free:
            raise UsageError(
                f"llama.cpp can only fit to devices that it sees, and there is no {device.name} here",
                hint="Leave out --compare-fit, or plan for this machine: it cannot imagine others.",
            )
        if device.budget_bytes // MIB > free[device.name]:
            raise UsageError(
                f"llama.cpp would not fit to {format_bytes(device.budget_bytes)} on {device.name}: only "
                f"{format_bytes(free[device.name] * MIB)} are free",
                hint=f"Plan with --device-memory {device.name}={free[device.name]}M or less.",
            )
        margins.append(free[device.name] + 1 - device.budget_bytes // MIB)
    return margins


def _ask(argv: Sequence[str], limit_s: float) -> subprocess.CompletedProcess[str]:
    """Run the program; LLAMA_ARG_* of the environment would be taken for flags."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_ARG_")}
    try:
        return subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            env=environ,
            timeout=limit_s,
            check=False,
        )
    except OSError as error:
        raise EngineError(
            f"{argv[0]} cannot be started: {error.strerror}", hint="Build it again with scripts/peers."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise EngineError(
            f"{PROGRAM} did not answer in {limit_s:.0f} s", hint="Are the devices and RPC workers reachable?"
        ) from error


def _overrides(text: str) -> tuple[Override, ...]:
    rules = []
    for part in text.split(","):
        pattern, separator, buffer = part.partition("=")
        if not separator:
            raise ValueError
        rules.append(Override(pattern, buffer))
    return tuple(rules)


def _expert_layers_on_host(header: ModelHeader, rules: Sequence[Override]) -> set[int]:
    """Layers with a routed-expert tensor in host memory, whole or in part."""
    compiled = [(re.compile(rule.pattern), rule.buffer) for rule in rules]
    moved = set()
    for tensor in header.tensors:
        layer = layer_of(tensor.name)
        if layer is None or not is_expert(tensor.name):
            continue
        if next((buffer for pattern, buffer in compiled if pattern.search(tensor.name)), None) == HOST:
            moved.add(layer)
    return moved
