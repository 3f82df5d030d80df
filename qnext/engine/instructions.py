"""Which instruction sets the installed engine was compiled with, against those the CPU has.

llama.cpp is compiled for one CPU. Compiled for a lesser one it is slow; compiled for a better one it dies
with SIGILL, often as early as its tables are filled, before any model. Nothing in the files tells, so the
engine is asked in its child (`llama_print_system_info`, whose CPU part lists what the compiler was told),
once per machine and build; that the child died of an illegal instruction is an answer too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from qnext.engine.build import EngineBuild
from qnext.engine.cache import write_atomically
from qnext.engine.crash import EngineCrashError
from qnext.errors import EngineError

logger = logging.getLogger(__name__)

ASK_LIMIT_S = 5.0
"""The answer takes 0.2 s on a quiet machine."""

_NAMES = {
    "SSSE3": "ssse3", "AVX": "avx", "AVX2": "avx2", "AVX_VNNI": "avx_vnni", "F16C": "f16c", "FMA": "fma",
    "BMI2": "bmi2", "AVX512": "avx512f", "AVX512_VBMI": "avx512vbmi", "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16", "AMX_INT8": "amx_int8",
    "NEON": "neon", "DOTPROD": "dotprod", "FP16_VA": "fp16", "MATMUL_INT8": "i8mm", "SVE": "sve",
    "SME": "sme",
}  # fmt: skip
"""ggml's names (ggml_backend_cpu_get_features) -> those of `Cpu.instruction_sets`."""

REPORTED = frozenset(_NAMES.values())
"""Sets whose absence means something: llama.cpp reports no others (not avx512bw, amx_tile, sve2)."""


@dataclass(frozen=True, slots=True)
class CompiledSets:
    """`sets` is sorted, None where the engine could not say. `illegal`: it died of an illegal instruction,
    which proves a build for another CPU. `reason` says why `sets` is None."""

    sets: tuple[str, ...] | None
    illegal: bool = False
    reason: str = ""


def instructions_entry(probes_dir: Path, fingerprint: str, build: EngineBuild) -> Path:
    """Cache file of `compiled_sets` for a machine (`machine_fingerprint`) and a build."""
    return probes_dir / f"instructions-{fingerprint}-{build.digest}.json"


def compiled_sets(build: EngineBuild, entry: Path, *, ask: bool = True) -> CompiledSets:
    """The build's instruction sets from cache file `entry`, else with `ask` from the engine in a child.

    Never raises; an answer that failed for another reason than the CPU is not kept.
    """
    known = _read(entry, build)
    if known is not None:
        return known
    if not ask:
        return CompiledSets(None, reason="not asked yet: needs the engine to be started")
    answer = _ask_engine()
    if answer.sets is not None or answer.illegal:
        content = {"build": build.digest, "sets": answer.sets, "illegal": answer.illegal}
        write_atomically(entry, json.dumps(content))
    return answer


def parse_system_info(text: str) -> tuple[str, ...] | None:
    """Sorted sets of the CPU part of `CPU : AVX2 = 1 | … | CUDA : ARCHS = 890 | …`; None without one."""
    part = re.search(r"(?:^|\| *)CPU : (.*?)(?=\| *\w+ : |$)", text, re.DOTALL)
    if part is None:
        return None
    on = {name for name, value in re.findall(r"(\w+) = (\d+)", part[1]) if value != "0"}
    return tuple(sorted(_NAMES[name] for name in on & _NAMES.keys()))


def _ask_engine() -> CompiledSets:
    from qnext.engine.session import EngineSession

    try:
        with EngineSession(silence_limit_s=ASK_LIMIT_S) as session:
            text = str(session.describe().get("system_info", ""))
    except EngineError as error:
        logger.info("the engine's instruction sets are unknown: %s", error.message)
        illegal = isinstance(error, EngineCrashError) and error.kind == "illegal"
        return CompiledSets(None, illegal, error.message)
    sets = parse_system_info(text)
    return CompiledSets(sets, reason="" if sets is not None else "the engine does not tell")


def _read(entry: Path, build: EngineBuild) -> CompiledSets | None:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(entry.read_text())
        if known["build"] == build.digest:
            if known["illegal"] is True:
                return CompiledSets(None, True, "it died of an illegal instruction when it was asked")
            return CompiledSets(tuple(str(name) for name in known["sets"]))
    return None
