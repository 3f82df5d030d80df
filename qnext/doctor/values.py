"""The doctor's values: what it looks at, what it finds, and what a finding costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from qnext.plan.options import RepackPolicy
from qnext.plan.values import SpeedRange

Level = Literal["error", "warning", "info"]

LEVELS: tuple[Level, ...] = ("error", "warning", "info")
"""Worst first."""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """The installed engine as the rules need it.

    `build` is what people know it by (`llama-cpp-python 0.3.36`), None when there is no engine.
    `claimants` are the distributions that provide the import name `llama_cpp`; `backends` are those compiled
    in; `compiled_sets` the instruction sets of its CPU code, None when it was not asked, and
    `dies_of_instruction` whether it died when it was. `safe_layout` is the
    probed weight layout, None when not probed. `rebuild` is the command that builds the tested engine for
    this CPU and all of its GPUs.
    """

    build: str | None = None
    expected: bool = True
    pinned_version: str = ""
    claimants: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    compiled_sets: tuple[str, ...] | None = None
    dies_of_instruction: bool = False
    safe_layout: RepackPolicy | None = None
    rebuild: str = "Build the engine on this machine."


@dataclass(frozen=True, slots=True)
class Variable:
    """An environment variable that changes what an engine does. `reaches_engine`: ours, not only others."""

    name: str
    effect: str
    reaches_engine: bool


@dataclass(frozen=True, slots=True)
class Change:
    """One speed now and with the fault mended, tokens per second; None where the model does not fit."""

    now: SpeedRange | None
    mended: SpeedRange | None

    @property
    def share(self) -> float | None:
        """What the fault takes: -0.45 where 9 t/s would be 16; None when one side is unknown."""
        if self.now is None or self.mended is None or not self.mended.mid:
            return None
        return self.now.mid / self.mended.mid - 1


@dataclass(frozen=True, slots=True)
class Price:
    """What a finding costs a stated model. `supposing` is a condition that the figures rest on, or empty."""

    model: str
    decode: Change
    prefill: Change
    supposing: str = ""

    @property
    def worst(self) -> float:
        """The larger of both losses as a negative share; -1 where the model fits only when mended."""
        if self.decode.now is None and self.decode.mended is not None:
            return -1.0
        return min(self.decode.share or 0.0, self.prefill.share or 0.0)


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault: `what` it is, `because` of which figures, what to do, and what it costs.

    `about` is the fact it belongs to (`memory.modules`, `gpus.0.link`, `engine.build`). Without a `price`,
    `unpriced` says why there is none.
    """

    id: str
    level: Level
    about: str
    what: str
    because: str
    fix: str
    price: Price | None = None
    unpriced: str = ""


def finding_to_dict(finding: Finding, price_text: str) -> dict[str, Any]:
    """JSON form: the finding's fields, `price` as an object with its `text`, or null."""
    price = finding.price
    plain = asdict(finding)
    if price is not None:
        plain["price"] = {
            "text": price_text,
            "model": price.model,
            "decode": {**asdict(price.decode), "share": price.decode.share},
            "prefill": {**asdict(price.prefill), "share": price.prefill.share},
            "supposing": price.supposing or None,
        }
    plain["unpriced"] = finding.unpriced or None
    return plain
