"""Claims and the commands that prove them, in one place.

A module of this package belongs to one capability and holds its lines: each a function that measures and
returns a Figure, registered under a name with the bar that it has to hold.

    @claim("version-start", "`qnext --version` beside a bare interpreter's start", bar="under 0.12 s")
    def measure_version_start() -> Figure:
        seconds = ...
        return Figure(seconds, "s", holds=seconds < 0.12, detail="15 pairs")

`scripts/claims` finds the modules by itself. A claim that needs what is not here (a peer program, a GPU)
raises CannotMeasure with the command that brings it. Nothing here runs in the default tests.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Figure:
    """What was measured. `holds` is the verdict against the bar, None where there is nothing to compare."""

    value: float
    unit: str
    holds: bool | None
    detail: str = ""


def run_script(name: str, *arguments: str, check: bool = False) -> dict[str, Any]:
    """The JSON that `scripts/NAME` prints. With `check` a failing exit code is an error, too."""
    argv = [sys.executable, "-P", str(ROOT / "scripts" / name), *arguments]
    ran = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=check)
    if not ran.stdout:
        raise ValueError((ran.stderr.strip().splitlines() or [f"{name} printed nothing"])[-1])
    result: dict[str, Any] = json.loads(ran.stdout)
    return result


class CannotMeasure(Exception):
    """This machine lacks what the claim needs; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Claim:
    """`minutes` is how long measuring takes, for people who wait."""

    name: str
    what: str
    bar: str
    measure: Callable[[], Figure]
    minutes: float


_claims: dict[str, Claim] = {}


def claim(
    name: str, what: str, *, bar: str, minutes: float = 0.1
) -> Callable[[Callable[[], Figure]], Callable[[], Figure]]:
    """Register the decorated function as the measurement of one claim."""

    def register(measure: Callable[[], Figure]) -> Callable[[], Figure]:
        if name in _claims:
            raise ValueError(f"two claims are named {name}")
        _claims[name] = Claim(name, what, bar, measure, minutes)
        return measure

    return register


def all_claims() -> list[Claim]:
    """Every claim of every module here, in the order of modules and lines."""
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{__name__}.{module.name}")
    return list(_claims.values())
