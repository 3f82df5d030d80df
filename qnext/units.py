"""Sizes: integer bytes inside, binary units for people (1 GiB = 2**30), as llama.cpp prints them."""

from __future__ import annotations

import re

from qnext.errors import UsageError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_FACTORS = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1 << 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of `24G`, `24GiB`, `512M`, `1.5g` or a plain count. Units are binary. Raises UsageError."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(
            f"'{text}' is not a size", hint="Write a number with K, M, G or T, for example 24G or 512M."
        )
    return int(float(match.group(1)) * _FACTORS[match.group(2).upper()])


def format_bytes(count: int | None) -> str:
    """`42.78 GiB`, `340.8 MiB`, `12 KiB`, `97 B`; `unknown` for None."""
    if count is None:
        return "unknown"
    sign, size = ("-", -count) if count < 0 else ("", count)
    if size >= GIB:
        return f"{sign}{size / GIB:.2f} GiB"
    if size >= MIB:
        return f"{sign}{size / MIB:.1f} MiB"
    if size >= KIB:
        return f"{sign}{size / KIB:.0f} KiB"
    return f"{sign}{size} B"
