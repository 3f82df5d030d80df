"""When a server that died is tried again: soon the first time, ever later, and not for ever."""

from __future__ import annotations

import time

MOST_DEATHS = 5
WINDOW_S = 300.0
"""So many deaths in so short a time, and it is given up."""
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 30.0

GIVEN_UP = f"given up after {MOST_DEATHS} crashes within {WINDOW_S / 60:.0f} minutes"


class Restarts:
    """The deaths of one server."""

    def __init__(self) -> None:
        self._deaths: list[float] = []

    def after_death(self) -> float | None:
        """It just died: seconds to wait before the next try (1, 2, 4 … 30), None when it is given up."""
        now = time.monotonic()
        self._deaths = [*(when for when in self._deaths if now - when < WINDOW_S), now]
        if len(self._deaths) >= MOST_DEATHS:
            return None
        return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** (len(self._deaths) - 1))
