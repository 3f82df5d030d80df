"""Turns the death of the engine child into words: what happened, the last log lines, what to try next.

llama.cpp ends its process on failed assertions (SIGABRT), on bugs and unsupported layouts (SIGSEGV), on
instructions the CPU lacks (SIGILL), when an RPC worker goes away (abort), and the kernel ends it when memory
runs out (SIGKILL). Each cause leaves a trace in the exit status or in the last lines of the log.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from typing import Literal

from qnext.errors import EngineError

CrashKind = Literal[
    "crash", "amx", "abort", "illegal", "killed", "hang", "rpc_lost", "refused", "missing", "exit"
]

_RPC_LOST = re.compile(
    r"RPC server|rpc.*(?:crash|disconnect|malformed|lost|closed)|Remote RPC", re.IGNORECASE
)
_INTERESTING = re.compile(
    r"error|fail|assert|abort|cannot|unable|invalid|not enough|out of memory", re.IGNORECASE
)
TAIL_LINES = 6


class EngineCrashError(EngineError):
    """The engine child died, hung or refused. `kind` says how; `log_tail` is what it said last."""

    def __init__(self, message: str, *, hint: str, kind: CrashKind, log_tail: Sequence[str]) -> None:
        super().__init__(message, hint=hint)
        self.kind = kind
        self.log_tail = tuple(log_tail)


def explain_exit(
    returncode: int,
    log: Sequence[str],
    *,
    doing: str,
    amx_in_use: bool = False,
    killed_for_hang: float | None = None,
) -> EngineCrashError:
    """The error for a child that ended with `returncode` (negative: signal number) while `doing` this."""
    kind, what, hint = _diagnose(returncode, log, amx_in_use, killed_for_hang)
    return EngineCrashError(f"{what} while {doing}", hint=hint, kind=kind, log_tail=interesting_tail(log))


def interesting_tail(log: Sequence[str]) -> list[str]:
    """The last few lines that say something about a failure, else simply the last few."""
    telling = [line for line in log[-80:] if _INTERESTING.search(line)]
    return list((telling or log)[-TAIL_LINES:])


def _diagnose(
    returncode: int, log: Sequence[str], amx_in_use: bool, killed_for_hang: float | None
) -> tuple[CrashKind, str, str]:
    if killed_for_hang is not None:
        return (
            "hang",
            f"the engine gave no sign of life for {killed_for_hang:.0f} s and was ended",
            "Try again with a smaller --ubatch, or raise the limit with QNEXT_ENGINE_TIMEOUT.",
        )
    if any(_RPC_LOST.search(line) for line in log[-40:]):
        return (
            "rpc_lost",
            "the RPC worker went away, and llama.cpp ends when that happens",
            "Start the worker again (`qnext worker`), check the network, then repeat the command.",
        )
    if returncode >= 0:
        return (
            "exit",
            f"the engine ended by itself with status {returncode}",
            "The log lines above say more; run the command again with -v to see all of them.",
        )
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    if name == "SIGKILL":
        return (
            "killed",
            "the engine was killed from outside, which is what the kernel does when memory runs out",
            "Plan with less memory: --ram, a smaller --ctx-size or quant. `dmesg | tail` names the reason.",
        )
    if name == "SIGILL":
        return (
            "illegal",
            "the engine met an instruction this CPU does not have (SIGILL): it was built for another CPU",
            "Build it for this one: QNEXT_REBUILD_ENGINE=1 ./scripts/qnext --version",
        )
    if name == "SIGABRT":
        return (
            "abort",
            "the engine stopped itself on a failed check (SIGABRT)",
            "Try another placement (for example without -ot overrides); the log lines above name the check.",
        )
    if amx_in_use:
        return (
            "amx",
            f"the engine crashed ({name}) with weights in AMX buffers, a known fault of llama.cpp",
            "Use --repack experts (expert weights in CPU_REPACK, nothing in AMX), or --repack off.",
        )
    return (
        "crash",
        f"the engine crashed ({name})",
        "Try --repack off and no -ot overrides; the log lines above belong in a bug report.",
    )
