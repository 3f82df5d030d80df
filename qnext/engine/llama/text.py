"""Generated text as it may be shown: whole characters, and nothing from a stop string on."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Turns token bytes into text. Characters and stop strings may be spread over several tokens."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = [stop for stop in stops if stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False
        self.stop_text: str | None = None

    def feed(self, piece: bytes, *, final: bool = False) -> str:
        """Text that is safe to show now; `stopped` becomes true once a stop string, `stop_text`, has come.

        What may be the beginning of a stop string is held back until the next piece, or `final`.
        """
        text = self._held + self._decoder.decode(piece, final)
        self._held = ""
        found = [(index, stop) for stop in self._stops if (index := text.find(stop)) >= 0]
        if found:
            index, self.stop_text = min(found)
            self.stopped = True
            return text[:index]
        held = 0 if final else self._unfinished(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _unfinished(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
