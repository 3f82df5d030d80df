"""The names of tests as llama-bench writes them, and the lists they are made from.

`pp512` processes a prompt of 512 tokens, `tg128` generates 128 tokens one by one, and ` @ d4096` says that
4096 tokens are in the context already. `-p`, `-n` and `-d` take numbers and ranges by comma, as there:
`512,1024`, `0-4096+1024` (steps added) and `512-4096*2` (steps multiplied).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qnext.errors import UsageError

_NAME = re.compile(r"(pp|tg)([0-9]+)(?:\s*@\s*d([0-9]+))?", re.IGNORECASE)
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+)(?:([+*])([0-9]+))?)?")
_MOST_COUNTS = 1000
_MOST_TOKENS = 2**31 - 1
"""llama.cpp counts tokens in a 32-bit signed integer."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One test to run: either `prompt` or `generate` tokens, the other 0, with `depth` tokens before them."""

    prompt: int
    generate: int
    depth: int = 0

    @property
    def name(self) -> str:
        """`pp512`, `tg128`, `pp512 @ d4096`."""
        base = f"pp{self.prompt}" if self.prompt else f"tg{self.generate}"
        return f"{base} @ d{self.depth}" if self.depth else base

    @property
    def tokens(self) -> int:
        """Tokens that are timed; those of the depth are not."""
        return self.prompt or self.generate


def parse_name(text: str) -> Scenario:
    """The test that bears this name; case and blanks do not matter. Raises UsageError."""
    match = _NAME.fullmatch(text.strip())
    if match is None or int(match[2]) == 0 or max(int(match[2]), int(match[3] or 0)) > _MOST_TOKENS:
        raise UsageError(
            f"'{text}' is not the name of a test", hint="Write it like pp512, tg128 or 'tg128 @ d4096'."
        )
    tokens, depth = int(match[2]), int(match[3] or 0)
    return Scenario(tokens, 0, depth) if match[1].lower() == "pp" else Scenario(0, tokens, depth)


def parse_counts(text: str, option: str) -> tuple[int, ...]:
    """The token counts of a list like `512,1024` or a range, each once, in order; `option` is for messages.

    Raises UsageError on anything else, on counts that llama.cpp cannot hold and on more than 1000 of them.
    """
    counts: dict[int, None] = {}
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise _not_a_list(text, option)
        first, last = int(match[1]), int(match[2] or match[1])
        step = int(match[4] or 1)
        if last < first or last > _MOST_TOKENS:
            raise _not_a_list(text, option)
        while first <= last:
            counts[first] = None
            following = first * step if match[3] == "*" else first + step
            if following <= first or len(counts) > _MOST_COUNTS:
                raise _not_a_list(text, option)
            first = following
    return tuple(counts)


def scenarios(
    prompts: Sequence[int], generates: Sequence[int], depths: Sequence[int] = (0,)
) -> tuple[Scenario, ...]:
    """The tests of a grid in llama-bench's order: by depth, prompts first. A count of 0 leaves its test out.

    Raises UsageError when nothing is left to run.
    """
    found = dict.fromkeys(
        scenario
        for depth in depths
        for scenario in (
            *(Scenario(prompt, 0, depth) for prompt in prompts if prompt),
            *(Scenario(0, generate, depth) for generate in generates if generate),
        )
    )
    if not found:
        raise UsageError(
            "there is no test to run: every -p and -n is 0", hint="Try the defaults: -p 512 -n 128."
        )
    return tuple(found)


def _not_a_list(text: str, option: str) -> UsageError:
    return UsageError(
        f"{option} {text}: not a list of token counts",
        hint=f"Write numbers or ranges by comma, for example {option} 512,1024 or {option} 0-4096+1024.",
    )
