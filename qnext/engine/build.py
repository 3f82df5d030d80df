"""Which engine is installed, found without loading it.

Two distributions share the import name `llama_cpp` (llama-cpp-python and a fork), and one version can be
built in many ways. A wheel's RECORD lists the hash of every installed file, native libraries included, so
the hash of RECORD identifies a build at no cost.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import metadata

from qnext.errors import EngineError

DISTRIBUTION = "llama-cpp-python"
PINNED_VERSION = "0.3.36"
_LLAMA_COMMITS = {"0.3.36": "0c1e57098"}
"""llama.cpp commit each release bundles, from llama-cpp-python's change log; the wheel does not say."""


@dataclass(frozen=True, slots=True)
class EngineBuild:
    """Identity of the installed engine. `digest` changes with any file of it; `backends` are compiled in."""

    name: str
    version: str
    llama_commit: str | None
    digest: str
    backends: tuple[str, ...]


@cache
def installed_build() -> EngineBuild | None:
    """The engine this Python would load, or None."""
    names = (
        metadata.packages_distributions().get("llama_cpp", []) if _fast_lookup() is None else [DISTRIBUTION]
    )
    if not names:
        return None
    distribution = metadata.distribution(names[0])
    record = distribution.read_text("RECORD") or ""
    libraries = {line.split(",")[0].rsplit("/", 1)[-1] for line in record.splitlines() if "libggml-" in line}
    backends = {name.removeprefix("libggml-").split(".")[0] for name in libraries} - {"base"}
    name = distribution.name.replace("_", "-")
    return EngineBuild(
        name=name,
        version=distribution.version,
        llama_commit=_LLAMA_COMMITS.get(distribution.version) if name == DISTRIBUTION else None,
        digest=hashlib.sha256(record.encode()).hexdigest()[:16],
        backends=tuple(sorted(backends)),
    )


def _fast_lookup() -> metadata.Distribution | None:
    """The expected distribution by name; listing every package of the environment takes far longer."""
    try:
        return metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None


def require_build() -> EngineBuild:
    """The installed build. Raises EngineError when there is none."""
    build = installed_build()
    if build is None:
        raise EngineError(
            "llama-cpp-python is not installed, so no model can be loaded",
            hint="Run ./scripts/qnext, which builds it, or pip install 'qnext[engine]'.",
        )
    return build
