"""What can go wrong on someone else's machine, each as two lines: what is wrong, and what to do.

pip and CMake say why they failed somewhere in thousands of lines. The patterns here are the few causes that
people meet; anything else shows the log's last lines and its path.
"""

from __future__ import annotations

import re
from pathlib import Path

COMPILER_HINT = (
    "Install one and run the same command again: sudo apt install build-essential (Debian, Ubuntu), "
    "sudo dnf install gcc-c++ (Fedora), xcode-select --install (macOS). "
    "Without the engine: QNEXT_NO_ENGINE=1 before the command (everything but loading a model works)."
)

_CAUSES = (
    (
        r"No space left on device|Disk quota exceeded|Errno 28",
        "The disk is full",
        "Free about 2 GB where the environment and {cache} are, or name other places with QNEXT_VENV and "
        "XDG_CACHE_HOME; then run the same command again.",
    ),
    (
        r"DO NOT MATCH THE HASHES|Expected sha256",
        "A downloaded package is not the pinned one (its hash differs)",
        "Run it again; if it stays so, the package index or a proxy alters files (pins: constraints.txt).",
    ),
    (
        r"NewConnectionError|NameResolutionError|name resolution|Connection refused|Network is unreachable"
        r"|Max retries exceeded|ReadTimeout|ConnectTimeout|timed out|SSLError|ProxyError",
        "The package index cannot be reached",
        "Check the network (HTTPS_PROXY, PIP_INDEX_URL and pip's own settings are honoured), then run the "
        "same command again.",
    ),
    (
        r"No matching distribution found for (?P<what>[^\s(]+)|Could not find a version that satisfies the "
        r"requirement (?P<again>[^\s(]+)",
        "The package index has no {what} for this Python and system",
        "Check the network and pip's settings (PIP_NO_INDEX, PIP_INDEX_URL), or try another Python with "
        "QNEXT_PYTHON=/path/to/python3.12.",
    ),
    (
        r"No CMAKE_CXX_COMPILER could be found|is not able to compile a simple test program",
        "The C++ compiler does not work",
        COMPILER_HINT,
    ),
    (
        r"Killed signal terminated program|virtual memory exhausted|cannot allocate memory",
        "The compiler ran out of memory",
        "Compile with fewer jobs: CMAKE_BUILD_PARALLEL_LEVEL=1 before the command.",
    ),
)


class SetupError(Exception):
    """Set-up cannot go on. `hint` is the next step; `tail` the log's end where the cause is unknown."""

    def __init__(self, message: str, hint: str, *, tail: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.tail = tail


def explain_log(log: Path, what_failed: str, cache: Path) -> SetupError:
    """The error of a step whose program failed, from its log."""
    text = log.read_text(errors="replace")
    for pattern, message, hint in _CAUSES:
        match = re.search(pattern, text)
        if match is not None:
            groups = [value for value in match.groupdict().values() if value]
            named = message.format(what=groups[0] if groups else "")
            return SetupError(f"{what_failed}: {named[0].lower()}{named[1:]}.", hint.format(cache=cache))
    errors = [line for line in text.splitlines() if re.search(r"\berror\b[: ]", line, re.IGNORECASE)]
    tail = "\n".join((errors[:3] + text.splitlines()[-12:]) if errors else text.splitlines()[-15:])
    return SetupError(f"{what_failed}.", f"The whole log is {log}", tail=tail)
