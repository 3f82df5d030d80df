"""What every engine child is started with: its environment, and how long it may be silent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable

from qnext.errors import UsageError

DEFAULT_SILENCE_LIMIT_S = 600.0
_PR_SET_PDEATHSIG = 1


def silence_limit() -> float:
    """Seconds of QNEXT_ENGINE_TIMEOUT, or the default. Raises UsageError when it is no positive number."""
    text = os.environ.get("QNEXT_ENGINE_TIMEOUT", "")
    if not text.strip():
        return DEFAULT_SILENCE_LIMIT_S
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 0 < limit <= threading.TIMEOUT_MAX:
        raise UsageError(
            f"QNEXT_ENGINE_TIMEOUT is '{text}', not a number of seconds",
            hint=f"Leave it out ({DEFAULT_SILENCE_LIMIT_S:.0f} s), or set it like QNEXT_ENGINE_TIMEOUT=1800.",
        )
    return limit


def child_environment() -> dict[str, str]:
    """Environment for an engine child: ours without LLAMA_ARG_*, and with the same qnext importable.

    ggml's backtrace on abort is off unless asked for: it starts a debugger, which delays the end by seconds
    and outlives it.
    """
    import qnext

    root = os.path.dirname(os.path.dirname(os.path.abspath(qnext.__file__)))  # noqa: PTH100, PTH120
    known = os.environ.get("PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_ARG_")}
    environment["PYTHONPATH"] = f"{root}{os.pathsep}{known}" if known else root
    environment.setdefault("GGML_NO_BACKTRACE", "1")
    return environment


def dying_with(parent: int) -> Callable[[], None] | None:
    """What a child of `parent` does to be killed when the thread that started it ends (prctl(2)).

    Even a stopped child dies then, which cannot notice that its pipes close. None where there is no such
    thing: only Linux has it.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return ask
