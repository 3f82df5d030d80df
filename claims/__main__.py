"""scripts/claims [NAME…] [--list] [--json] [--record]: measure the claims, a line each.

NAME may end in `*`; `--record` writes what was measured to claims/FIGURES.md. Status 1 when a claim does not
hold or its measurement failed; a claim that cannot be measured on this machine says why and does not count as
held.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from claims import CannotMeasure, Claim, Figure, all_claims
from claims._record import record, shown, write
from qnext.errors import QnextError


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/claims", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these; may end in *")
    parser.add_argument("--list", action="store_true", help="show names, bars and durations, measure nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--record", action="store_true", help="write what was measured to claims/FIGURES.md")
    options = parser.parse_args()
    known = all_claims()
    unknown = [name for name in options.names if not any(fnmatch.fnmatch(c.name, name) for c in known)]
    if unknown:
        parser.error(f"no claim is named {', '.join(unknown)}; --list shows all")
    asked = [c for c in known if not options.names or any(fnmatch.fnmatch(c.name, n) for n in options.names)]
    if options.list:
        for one in asked:
            print(f"{one.name:28}  {one.bar:44}  {one.minutes:4.1f} min  {one.what}")
        return 0
    machine = describe_machine()
    verdicts = []
    for one in asked:
        verdict, row = _measure(one, machine, as_json=options.json)
        verdicts.append(verdict)
        if options.record and verdict in ("holds", "DOES NOT HOLD", "no bar"):
            write(row, known)
    return 1 if {"DOES NOT HOLD", "failed"} & set(verdicts) else 0


def _measure(one: Claim, machine: str, *, as_json: bool) -> tuple[str, str]:
    """Print what a claim gives; its verdict, and its row of claims/FIGURES.md."""
    print(f"measuring {one.name} (about {one.minutes:g} min) …", file=sys.stderr, flush=True)
    figure: Figure | None = None
    try:
        figure = one.measure()
        verdict = {True: "holds", False: "DOES NOT HOLD", None: "no bar"}[figure.holds]
        detail = figure.detail
    except CannotMeasure as reason:
        verdict, detail = "not measured", str(reason)
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip().splitlines()
        verdict, detail = "failed", said[-1] if said else f"status {error.returncode}"
    except (QnextError, OSError, ValueError, subprocess.SubprocessError) as error:
        verdict, detail = "failed", f"{type(error).__name__}: {error}"
    if as_json:
        line = {"schema": "qnext.claim/1", "name": one.name, "what": one.what, "bar": one.bar,
                "figure": asdict(figure) if figure else None, "verdict": verdict, "detail": detail,
                "machine": machine}  # fmt: skip
        print(json.dumps(line), flush=True)
    else:
        print(" | ".join((one.name, shown(figure), one.bar, verdict, detail or "-", machine)), flush=True)
    return verdict, record(one, figure, verdict, detail, machine)


def describe_machine() -> str:
    """Processor, usable cores, memory and GPUs in a few words."""
    from qnext.hardware import detect_machine
    from qnext.units import format_bytes

    machine = detect_machine(Path.cwd())
    gpus = [gpu.name or "GPU" for gpu in machine.gpus]
    return ", ".join(
        (
            machine.cpu.model or "unknown CPU",
            f"{machine.cpu.usable_logical_cores or '?'} threads",
            format_bytes(machine.memory.total_bytes),
            " + ".join(gpus) or "no GPU",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
