"""Which job the engine keeps dying of: one that brings it down time after time must not be tried for ever.

Clients send a failed request again by themselves, so a single one that crashes the engine would keep the
server from everybody. Of a job only a hash is kept here, never its text.
"""

from __future__ import annotations

from collections.abc import Iterable

from qnext.engine.crash import EngineCrashError
from qnext.errors import QnextError
from qnext.pipeline.serve_values import Job

_ITS_OWN = ("crash", "amx", "abort", "illegal", "hang")
"""Ways of dying that a job can bring about; the others (killed from outside, a worker lost) are no proof."""


class Suspects:
    """Jobs that were in a slot when the engine died. Belongs to one thread."""

    def __init__(self) -> None:
        self._present: set[int] = set()
        self._guilty: set[int] = set()

    def add(self, error: QnextError, jobs: Iterable[Job]) -> list[Job]:
        """Remember the `jobs` of this death; returns those that were there at an earlier one too.

        A single one of these is guilty: it is all that two deaths have in common.
        """
        if not isinstance(error, EngineCrashError) or error.kind not in _ITS_OWN:
            return []
        marks = {_mark(job): job for job in jobs}
        again = marks.keys() & self._present
        self._present |= marks.keys()
        if len(again) == 1:
            self._guilty |= again
        return [marks[mark] for mark in again]

    def is_guilty(self, job: Job) -> bool:
        """Whether this job is known to bring the engine down."""
        return bool(self._guilty) and _mark(job) in self._guilty


def _mark(job: Job) -> int:
    return hash((job.text, job.tokens, job.grammar))
