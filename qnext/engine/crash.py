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
    "crash",
    "amx",
    "abort",
    "illegal",
    "killed",
    "hang",
    "rpc_lost",
    "refused",
    "missing",
    "exit",
    "ended",
]
"""How it ended. `refused` and `missing`: alive, but it said no. `ended`: we had ended it before."""

_RPC_LOST = re.compile(r"Remote RPC server crashed|RPC handshake failed for|Failed to connect to \S+:\d+")
"""What ggml-rpc.cpp prints before it aborts."""
_INTERESTING = re.compile(
    r"error|fail|assert|abort|cannot|unable|invalid|not enough|out of memory", re.IGNORECASE
)
TAIL_LINES = 6
_TELLING_LINES = 3


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
    """The last lines, after those shortly before them that speak of a failure."""
    recent = [line for line in log if line.strip()]
    earlier = [line for line in recent[-80:-TAIL_LINES] if _INTERESTING.search(line)]
    return [*earlier[-_TELLING_LINES:], *recent[-TAIL_LINES:]]


def _diagnose(
    returncode: int, log: Sequence[str], amx_in_use: bool, killed_for_hang: float | None
) -> tuple[CrashKind, str, str]:
    if killed_for_hang is not None:
        return (
            "hang",
            f"the engine was ended because it gave no sign of life for {killed_for_hang:g} s",
            "Try again with a smaller -ub and -b, or raise the limit with QNEXT_ENGINE_TIMEOUT.",
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
    if name == "SIGABRT" and any(_RPC_LOST.search(line) for line in log[-40:]):
        return (
            "rpc_lost",
            "the engine ended itself because an RPC worker went away or cannot be reached",
            "Start the worker again (`qnext worker`), check the network, then repeat the command.",
        )
    if name == "SIGKILL":
        return (
            "killed",
            "the engine was killed from outside (SIGKILL)",
            "Plan with less memory (--ram, a smaller --ctx-size or quant): the kernel kills when it runs out,"
            " as `dmesg | tail` tells.",
        )
    if name == "SIGILL":
        return (
            "illegal",
            "the engine met an instruction this CPU does not have (SIGILL)",
            "Build it for this CPU: QNEXT_REBUILD_ENGINE=1 ./scripts/qnext --version",
        )
    if name == "SIGABRT":
        return (
            "abort",
            "the engine stopped itself on a failed check (SIGABRT)",
            "Try another placement (for example without -ot overrides); the log lines above name the check.",
        )
    if name in ("SIGTERM", "SIGINT", "SIGHUP"):
        return ("killed", f"someone ended the engine from outside ({name})", "Repeat the command.")
    if name == "SIGBUS":
        return (
            "crash",
            "the engine could not read memory that should be there (SIGBUS)",
            "Check the model file and its disk, or use --load-mode none, which does not map it.",
        )
    if amx_in_use:
        return (
            "amx",
            f"the engine crashed with weights in AMX buffers ({name}), a known fault of llama.cpp,",
            "Use --repack experts (expert weights in CPU_REPACK, nothing in AMX), or --repack off.",
        )
    return (
        "crash",
        f"the engine crashed ({name})",
        "Try --repack off and no -ot overrides; the log lines above belong in a bug report.",
    )
