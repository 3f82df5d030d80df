"""Two programs that measure the same thing, given the processor in turns of a tenth of a second.

On a shared machine the speed of the same run moves by a third within a minute, so that runs one after the
other differ whatever they are. Here both programs are loaded at once, one runs while the other is stopped
(SIGSTOP), and whatever slows the machine strikes both. The time of a sample is the turns that fell into it,
not the time the program lay still.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import psutil

from qnext.engine.turns import give_turn, running_ns
from qnext.plan.options import RepackPolicy

Samples = dict[str, list[int]]
"""Nanoseconds of running per test name (pp512, tg128)."""


@dataclass(slots=True)
class Side:
    """A program and what was seen of it: runs as (test, began, ended), turns as (began, ended), monotonic ns.

    The program's own clock says how long a run took; a line that it prints says when.
    """

    argv: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    runs: list[tuple[str, int, int]] = field(default_factory=list)
    turns: list[tuple[int, int]] = field(default_factory=list)

    def heard(self, line: str, now: int) -> None:
        """Take note of a printed line."""
        raise NotImplementedError

    @property
    def ended(self) -> int:
        """Runs that are over."""
        return len(self.runs)

    def engine(self, process: psutil.Process) -> list[psutil.Process]:
        """The processes that compute."""
        return [process]


@dataclass(slots=True)
class LlamaBench(Side):
    """llama-bench with `--progress -o jsonl`: a line as each run begins, its length after the last one."""

    starts: list[int] = field(default_factory=list)

    @property
    def ended(self) -> int:
        return len(self.runs) + max(0, len(self.starts) - 1)

    def heard(self, line: str, now: int) -> None:
        if re.search(r": (prompt|generation) run \d", line):
            self.starts.append(now)
        elif line.startswith("{"):
            row = json.loads(line)
            test = f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}"
            for began, ns in zip(self.starts, row["samples_ns"], strict=True):
                self.runs.append((test, began, began + ns))
            self.starts.clear()


@dataclass(slots=True)
class QnextBench(Side):
    """`qnext bench run` followed sample by sample: `sample TEST NS` as each one ends. Its child computes."""

    def heard(self, line: str, now: int) -> None:
        if line.startswith("sample "):
            _, test, ns = line.split()
            self.runs.append((test, now - int(ns), now))

    def engine(self, process: psutil.Process) -> list[psutil.Process]:
        return process.children(recursive=True)


def take_turns(first: Side, second: Side, folder: Path) -> tuple[Samples, Samples]:
    """Run both to their end; the samples of each that were taken while both were at the same test.

    Raises subprocess.CalledProcessError when one of them fails.
    """
    sides = (first, second)
    programs = [_start(side, folder) for side in sides]
    try:
        while any(process.poll() is None for process, _ in programs):
            behind = min(side.ended for side in sides)
            for side, (process, _) in zip(sides, programs, strict=True):
                # Who is a run ahead waits, so that the same runs of both fall into the same moments.
                if side.ended == behind or (process.poll() is None and _alone(programs)):
                    _turn(side, process)
        for _, reader in programs:
            reader.join()
    finally:
        for side, (process, _) in zip(sides, programs, strict=True):
            for member in _computing(side, process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            process.kill()
            process.wait()
    for side, (process, _) in zip(sides, programs, strict=True):
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, list(side.argv))
    return _shared(sides)


def _alone(programs: Sequence[tuple[subprocess.Popen[str], threading.Thread]]) -> bool:
    return any(process.poll() is not None for process, _ in programs)


def _start(side: Side, folder: Path) -> tuple[subprocess.Popen[str], threading.Thread]:
    process = subprocess.Popen(
        side.argv,
        cwd=folder,
        env={**os.environ, **side.environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def follow() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            side.heard(line, time.perf_counter_ns())

    reader = threading.Thread(target=follow, daemon=True)
    reader.start()
    return process, reader


def _turn(side: Side, process: subprocess.Popen[str]) -> None:
    members = _computing(side, process)
    if not members and process.poll() is not None:
        return
    side.turns.append(give_turn(members))


def _computing(side: Side, process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return side.engine(psutil.Process(process.pid))
    except psutil.NoSuchProcess:
        return []


def _shared(sides: Sequence[Side]) -> tuple[Samples, Samples]:
    """Running time of the runs that both made at about the same time: those that overlap by a half."""
    kept: tuple[Samples, Samples] = ({}, {})
    for test in dict.fromkeys(test for test, _, _ in sides[0].runs):
        one, other = ([run[1:] for run in side.runs if run[0] == test] for side in sides)
        for pair in zip(one, other, strict=True):
            common = min(ended for _, ended in pair) - max(began for began, _ in pair)
            if common < max(ended - began for began, ended in pair) / 2:
                continue  # one of them was still loading or warming up
            for side, (began, ended), samples in zip(sides, pair, kept, strict=True):
                samples.setdefault(test, []).append(running_ns(side.turns, began, ended))
    return kept


def _follow(model: str, layout: RepackPolicy, threads: int, prompt: int, generate: int, samples: int) -> None:
    """What a QnextBench side runs: `qnext bench run` with a line for each sample."""
    from qnext.bench.names import Scenario
    from qnext.config import find_paths
    from qnext.pipeline.benching import BenchWatch, run_bench
    from qnext.pipeline.request import Request

    def show(test: Scenario, done: Sequence[int], _total: int) -> None:
        print(f"sample {test.name} {done[-1]}", flush=True)

    tests = [Scenario(prompt, 0), Scenario(0, generate)]
    request = Request(model=model, threads=threads, repack=layout)
    run_bench(request, tests, samples, find_paths(), print, sys.argv, BenchWatch(on_sample=show))


if __name__ == "__main__":
    path, layout, *numbers = sys.argv[1:]
    _follow(path, cast(RepackPolicy, layout), *map(int, numbers))
