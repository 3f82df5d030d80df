"""Processes that compute at the same time, each while the others are stopped: a tenth of a second at a time.

On a shared machine the speed of one and the same run moves by a third within a minute, so that runs one after
the other differ whatever they are. Taking turns, whatever slows the machine strikes all of them alike. The
time of a run is then what of its process's turns fell into it (`running_ns`). Clocks: `time.perf_counter_ns`,
which on Linux is one for all processes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import psutil

TURN_S = 0.1

Span = tuple[int, int]
"""When something began and ended, ns."""


def in_turns(
    members: Sequence[Sequence[psutil.Process]],
    work: Sequence[Callable[[], object]],
    abort: Callable[[], object] | None = None,
) -> list[list[Span]]:
    """Do all of `work` at once, each while its own members run and the others' are stopped; turns of each.

    Raises what the work raises, when all of it is over. An interrupt calls `abort`, which has to end the
    work. Afterwards everyone runs.
    """
    everyone = [member for each in members for member in each]
    turns: list[list[Span]] = [[] for _ in members]
    with ThreadPoolExecutor(len(work)) as pool:
        stop(everyone)
        asked = [pool.submit(one) for one in work]
        try:
            while not all(future.done() for future in asked):
                for side, future in enumerate(asked):
                    if not future.done():
                        turns[side].append(give_turn(members[side]))
        except BaseException:
            go_on(everyone)
            if abort is not None:
                abort()
            raise
        finally:
            go_on(everyone)
        for future in asked:
            future.result()
    return turns


def give_turn(members: Sequence[psutil.Process]) -> Span:
    """Let stopped processes run for a turn: when it began and ended."""
    began = time.perf_counter_ns()
    go_on(members)
    time.sleep(TURN_S)
    stop(members)
    return began, time.perf_counter_ns()


def running_ns(turns: Sequence[Span], began: int, ended: int) -> int:
    """How much of `began` to `ended` fell into turns."""
    return sum(max(0, min(stopped, ended) - max(started, began)) for started, stopped in turns)


def stop(members: Sequence[psutil.Process]) -> None:
    """Stop each that is still there."""
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.suspend()


def go_on(members: Sequence[psutil.Process]) -> None:
    """Let each that is still there run again."""
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.resume()
