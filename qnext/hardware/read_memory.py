"""Reading RAM with many threads: the measuring side of `bandwidth`, run in a child process.

numpy's reductions run outside Python's lock and as fast as memory delivers, so plain threads are enough. A
thread notes the time after each block. Readings come from the stretch in which all threads were reading,
which needs no common start: with a hundred threads, waking them together would take longer than the reading.
Of each stretch the best slice counts, because whatever else the machine does only ever takes away.

The buffer of a memory node is written first by threads pinned to that node, which is what places it there,
and read only by them.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from qnext.units import MIB

LEAST_BLOCK_BYTES, MOST_BLOCK_BYTES = 4 * MIB, 16 * MIB
"""Read between two looks at the clock; more with many threads, for Python's part is done by one at a time."""
SLICE_S = 0.005
"""Length of a slice at least: short enough to fall between what other programs do with the cores."""
SLICE_BLOCKS = 10
"""Blocks of each thread in a slice at least: one that is cut counts as if it had been read evenly."""
PASSES = 6
"""For how many rounds through the numbers of threads there is time, at least."""
ALL_PASSES = 3
CONTENDER_SHARE = 0.85
"""After so many rounds a number of threads far below the best leaves its time to the others."""
_SHORTEST_S, _LONGEST_S = 0.06, 0.15
"""Bounds on the length of one turn."""
_PAGE_BYTES = 4096
_TOUCH_SHARE = 0.3
"""Part of the time that writing the buffers may take; what was not written by then is not read."""


@dataclass(slots=True)
class _Place:
    """A memory node: CPUs to pin to (empty: the system chooses), threads it may get, blocks written there."""

    node: int
    cpus: frozenset[int]
    seats: int
    blocks: list[Any] = field(default_factory=list)


@dataclass(slots=True)
class _Reader:
    """A thread's blocks, and when it began and ended each."""

    place: _Place
    blocks: Sequence[Any]
    times: list[float] = field(default_factory=list)

    def read(self, first: int, until: float, reduce: Callable[[Any], Any]) -> None:
        """Read around the blocks, from another one each turn, so that no cache holds the beginning."""
        _pin(self.place)
        self.times.append(time.perf_counter())
        for block in itertools.islice(itertools.cycle(self.blocks), first % len(self.blocks), None):
            reduce(block)
            self.times.append(time.perf_counter())
            if self.times[-1] > until:
                return


def measure(question: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Readings of RAM bandwidth until `ends` on the clock of time.monotonic, each `threads` at least once.

    `question` holds `threads` (numbers of threads to try), `bytes` (all buffers together), `least_bytes`
    (what of them has to be written however long it takes), `nodes` ([node, [CPU, …]] pairs; empty to leave
    placement to the system) and `ends`. Yields {"buffer_bytes"} and then {"threads", "bps",
    "nodes": [[node, bps], …]} for every reading, bps in bytes per second.
    """
    with contextlib.suppress(OSError):  # if memory runs out, this process is the one to go
        Path("/proc/self/oom_score_adj").write_text("1000")
    import numpy

    began, ends = time.monotonic(), float(question["ends"])
    best = dict.fromkeys(question["threads"], 0)
    places = _seat(max(best), [(node, frozenset(cpus)) for node, cpus in question["nodes"]])
    until = began + max(0.1, (ends - began) * _TOUCH_SHARE)
    yield {"buffer_bytes": _write(numpy, places, question["bytes"], question["least_bytes"], until)}
    turn_s = (ends - time.monotonic()) / (PASSES * len(best))
    turn_s = min(max(turn_s, _SHORTEST_S), _LONGEST_S)
    for turn in itertools.count():
        hopeful = CONTENDER_SHARE * max(best.values()) if turn >= ALL_PASSES else 0
        for threads in [threads for threads, rate in best.items() if rate >= hopeful]:
            if turn and time.monotonic() + turn_s > ends:
                return
            reading = _read(numpy, places, threads, turn_s, turn)
            best[threads] = max(best[threads], reading["bps"])
            yield {"threads": threads, **reading}


def _seat(threads: int, nodes: Sequence[tuple[int, frozenset[int]]]) -> list[_Place]:
    """Places with as many seats as they have CPUs, more where the threads need it."""
    if len(nodes) < 2:
        return [_Place(nodes[0][0] if nodes else 0, frozenset(), threads)]
    places = [_Place(node, cpus, 0) for node, cpus in nodes]
    for place in _spread(places, threads):
        place.seats += 1
    return [place for place in places if place.seats]


def _spread(places: Sequence[_Place], threads: int) -> list[_Place]:
    """The place of each thread: one after the other, leaving out those whose CPUs are all taken."""
    order = [
        place
        for rank in range(max((len(place.cpus) for place in places), default=0))
        for place in places
        if rank < len(place.cpus)
    ] or list(places)
    return list(itertools.islice(itertools.cycle(order), threads))


def _write(numpy: Any, places: Sequence[_Place], total: int, least: int, until: float) -> int:
    """Fill the places' blocks, at least one per seat and `least` bytes, and return the bytes written."""
    seats = sum(place.seats for place in places)
    size = min(max(LEAST_BLOCK_BYTES, seats * MIB // 4), MOST_BLOCK_BYTES, total // seats)
    size = max(1, size // _PAGE_BYTES) * _PAGE_BYTES
    jobs = []
    for place in places:
        count = max(place.seats, total * place.seats // seats // size)
        blocks = numpy.split(numpy.empty(count * size // 4, dtype=numpy.float32), count)
        needed = math.ceil(count * least / total / place.seats)
        jobs += [
            partial(_fill, place, blocks[seat :: place.seats], needed, until) for seat in range(place.seats)
        ]
    _run_together(jobs)
    return sum(int(block.nbytes) for place in places for block in place.blocks)


def _fill(place: _Place, blocks: Sequence[Any], needed: int, until: float) -> None:
    _pin(place)
    for count, block in enumerate(blocks, start=1):
        block.fill(1)
        place.blocks.append(block)
        if count >= needed and time.monotonic() > until:
            return


def _read(numpy: Any, places: Sequence[_Place], threads: int, seconds: float, turn: int) -> dict[str, Any]:
    """One reading: the best slice of `seconds` with so many threads, in all and of each place."""
    taken = _spread(places, threads)
    readers = []
    for place in places:
        seats = sum(other is place for other in taken)
        readers += [_Reader(place, place.blocks[seat::seats]) for seat in range(seats)]
    until = time.perf_counter() + seconds
    _run_together([partial(reader.read, turn, until, numpy.maximum.reduce) for reader in readers])
    slices = _slices(numpy, [reader.times for reader in readers])
    width = slices[0, 1] - slices[0, 0]
    rates: dict[int, Any] = {}
    for reader in readers:
        done = numpy.arange(len(reader.times)) * float(reader.blocks[0].nbytes)
        rate = numpy.diff(numpy.interp(slices, reader.times, done), axis=1)[:, 0] / width
        rates[reader.place.node] = rates.get(reader.place.node, 0) + rate
    return {
        "bps": round(float(sum(rates.values()).max())),
        "nodes": [[node, round(float(rate.max()))] for node, rate in rates.items()],
    }


def _slices(numpy: Any, clocks: Sequence[list[float]]) -> Any:
    """(begin, end) rows of slices, an eighth of one apart, from the time in which all were reading.

    Where there was no such time (another program had the cores), one row over everything.
    """
    begin, end = max(times[0] for times in clocks), min(times[-1] for times in clocks)
    if end <= begin:
        return numpy.array([[min(times[0] for times in clocks), max(times[-1] for times in clocks)]])
    block_s = sum(times[-1] - times[0] for times in clocks) / sum(len(times) - 1 for times in clocks)
    width = min(max(SLICE_S, SLICE_BLOCKS * block_s), end - begin)
    starts = numpy.linspace(begin, end - width, 1 + int((end - begin - width) / (width / 8)))
    return numpy.stack([starts, starts + width], axis=1)


def _pin(place: _Place) -> None:
    if place.cpus:
        os.sched_setaffinity(0, place.cpus)  # 0 is the calling thread


def _run_together(jobs: Sequence[Callable[[], None]]) -> None:
    """Run every job in a thread of its own. Raises the first OSError of any (a CPU that may not be used)."""
    failures: list[OSError] = []

    def guard(job: Callable[[], None]) -> None:
        try:
            job()
        except OSError as error:
            failures.append(error)

    workers = [threading.Thread(target=guard, args=(job,)) for job in jobs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]
