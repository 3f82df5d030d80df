"""How much the server takes on: the slots' answers and a limited number that wait for them.

Who waits, waits in the engine, which takes the next prompt within a step of a slot's end. Here is only
counted, so that a caller over the limit hears so at once instead of waiting without end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from qnext.serve.errors import ApiError

_WEIGHT = 0.2
"""Of the newest answer in the mean time of answers."""

MOST_WAIT_S = 60.0


class Gate:
    """Counts answers under way."""

    def __init__(self, queue_limit: int) -> None:
        self._limit = queue_limit
        self._answer_s = 1.0
        self.inside = 0
        self.turned_away = 0

    @contextmanager
    def pass_in(self, count: int, slots: int) -> Iterator[None]:
        """Hold `count` places. Raises ApiError: 429 when there are not as many, 400 when there never are."""
        self.enter(count, slots)
        began = time.monotonic()
        try:
            yield
        finally:
            self.inside -= count
            self._answer_s += _WEIGHT * (time.monotonic() - began - self._answer_s)

    def enter(self, count: int, slots: int) -> None:
        """Take `count` places or raise."""
        most = slots + self._limit
        if count > most:
            raise ApiError(
                400, f"{count} answers are asked for, but this server takes on {most} at a time", param="n"
            )
        if self.inside + count > most:
            self.turned_away += 1
            raise ApiError(
                429,
                f"the server is busy: {min(self.inside, slots)} of {slots} slots and "
                f"{max(self.inside - slots, 0)} of {self._limit} places in the queue are taken",
                code="rate_limit_exceeded",
                retry_after_s=self.wait_s(slots),
            )
        self.inside += count

    def wait_s(self, slots: int) -> float:
        """Seconds until a place may be free: the mean time of an answer over the number of slots."""
        return min(max(self._answer_s / max(slots, 1), 1.0), MOST_WAIT_S)
