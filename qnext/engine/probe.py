"""Finds the fastest weight layout that does not crash on this CPU, once per machine and engine build.

llama.cpp repacks CPU weights by default, on CPUs with AMX into AMX buffers, and on some of those the first
decode then dies (llama.cpp issue 20824). Whether it does here cannot be read anywhere, so a small model is
run in a child for each layout, fastest first, and the first that gives the right text is remembered. A layout
that failed for another reason (memory ran out, the machine was too busy) is passed over this time only.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from qnext.engine.build import EngineBuild
from qnext.engine.cache import write_atomically
from qnext.engine.crash import EngineCrashError
from qnext.engine.session import EngineSession
from qnext.errors import EngineError
from qnext.plan.options import RepackPolicy
from qnext.plan.values import Placement

logger = logging.getLogger(__name__)

PROBE_SILENCE_LIMIT_S = 60.0
PROBE_TOKENS = 2
"""One from the prefill, one from a decode. Few: each takes seconds where other work fills the cores."""
ORDER: tuple[RepackPolicy, ...] = ("full", "experts", "off")
LAYOUT_CRASHES = ("crash", "amx", "abort", "illegal")
"""Ways of ending (`EngineCrashError.kind`) that a weight layout may be the cause of."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The layout to use and, for each layout tried before it, how it failed."""

    policy: RepackPolicy
    failures: Mapping[str, str]


def safe_repack_policy(
    model: Path, prompt: str, placements: Mapping[RepackPolicy, Placement], build: EngineBuild, entry: Path
) -> ProbeResult:
    """The first layout of `ORDER` under which the demo `model` says its words; cached in file `entry`.

    `placements` gives the placement of each layout. The prompt should be some hundred tokens long, for the
    matrix kernels; decoding runs the vector kernels. Raises EngineError when no layout works at all.
    """
    known = known_policy(entry, build)
    if known is not None:
        return known
    failures: dict[str, str] = {}
    proven = True
    for policy in ORDER:
        try:
            _run(model, prompt, placements[policy])
        except EngineError as error:
            logger.info("layout %s fails here: %s", policy, error.message)
            failures[policy] = error.message
            proven = proven and (not isinstance(error, EngineCrashError) or error.kind in LAYOUT_CRASHES)
        else:
            if not proven:
                return ProbeResult(policy, failures)
            return remember_policy(entry, build, policy, failures)
    raise EngineError(
        f"the engine cannot run even a tiny model here: {failures[ORDER[-1]]}",
        hint="Build it again for this machine: QNEXT_REBUILD_ENGINE=1 ./scripts/qnext --version",
    )


def known_policy(entry: Path, build: EngineBuild) -> ProbeResult | None:
    """What file `entry` remembers for this build, if anything."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(entry.read_text())
        if known["build"] == build.digest and known["policy"] in ORDER:
            return ProbeResult(known["policy"], dict(known["failures"]))
    return None


def remember_policy(
    entry: Path, build: EngineBuild, policy: RepackPolicy, failures: Mapping[str, str]
) -> ProbeResult:
    """Keep `policy` as this machine's layout for this build, with what spoke against the faster ones."""
    result = ProbeResult(policy, dict(failures))
    write_atomically(entry, json.dumps({"build": build.digest, **asdict(result)}))
    return result


def _run(model: Path, prompt: str, placement: Placement) -> None:
    """Load, prefill and decode a little in a child of its own; raises EngineError if it dies or errs."""
    from qnext.models.synth import DEMO_SENTENCE

    small = replace(placement, context=1024, batch=1024, ubatch=1024)
    with EngineSession(silence_limit_s=PROBE_SILENCE_LIMIT_S) as session:
        session.open(str(model), small)
        events = session.generate(prompt, max_tokens=PROBE_TOKENS, sampling={})
        text = "".join(str(event.get("text", "")) for event in events)
    if not text or not DEMO_SENTENCE.startswith(text):
        raise EngineError(f"the engine wrote '{text}' where '{DEMO_SENTENCE[: len(text) or 5]}' was right")
