"""Compute estimate (stub)."""

from __future__ import annotations

from collections.abc import Sequence

from qnext.models.shape import ModelShape
from qnext.plan.traits import DeviceTraits
from qnext.plan.values import HOST, Placement
from qnext.plan.weights import PlacedTensor


def estimate_compute(
    shape: ModelShape,
    placement: Placement,
    placed: Sequence[PlacedTensor],
    layer_device: Sequence[str],
    devices: Sequence[DeviceTraits],
) -> dict[str, int]:
    """Stub."""
    return {HOST: 0}
