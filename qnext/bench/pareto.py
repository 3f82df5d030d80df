"""The configurations that no other one beats in everything: decode, prefill, context."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, ...]]) -> list[int]:
    """Indices, in order, of the points that no other point matches everywhere and exceeds somewhere.

    Every coordinate is better when larger: (decode t/s, prefill t/s, context). Equal points all stay.
    """

    def beaten(point: tuple[float, ...]) -> bool:
        return any(
            other != point and all(theirs >= own for theirs, own in zip(other, point, strict=True))
            for other in points
        )

    return [index for index, point in enumerate(points) if not beaten(point)]
