"""The override that moves the routed experts of some layers, written and read."""

from __future__ import annotations

import re

EXPERT_TENSORS = r"ffn_(up|down|gate_up|gate)_(ch|)exps"
"""Regex of llama.cpp's `--cpu-moe`: every routed-expert tensor of a block, fused and chunked ones too."""

_OURS = re.compile(rf"blk\\\.\((\d+(?:\|\d+)*)\)\\\.{re.escape(EXPERT_TENSORS)}")


def expert_pattern(layers: tuple[int, ...]) -> str:
    """Override pattern for the routed experts of these layers."""
    return rf"blk\.({'|'.join(str(layer) for layer in layers)})\.{EXPERT_TENSORS}"


def expert_layers(pattern: str) -> frozenset[str] | None:
    """The numbers of the layers that a pattern made by `expert_pattern` names; None for any other pattern."""
    found = _OURS.fullmatch(pattern)
    return frozenset(found[1].split("|")) if found else None
