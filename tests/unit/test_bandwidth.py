"""RAM bandwidth: what the curve promises, how much memory it takes, and that nothing outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnext.errors import HardwareError
from qnext.hardware import bandwidth as measured
from qnext.hardware.bandwidth import (
    Bandwidth,
    choose_buffer_bytes,
    measure_bandwidth,
    read_node_cpus,
    summarise_readings,
    sweep_threads,
    with_bandwidth,
)
from qnext.hardware.machine import Cpu, Machine, Memory, NumaNode
from qnext.units import GIB, MIB

ROOT = Path(__file__).resolve().parents[2]
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /sys, pins threads")


def check_contract(found: Bandwidth) -> None:
    threads = [count for count, _ in found.by_threads]
    rates = dict(found.by_threads)
    assert threads == sorted(set(threads))
    assert found.best_bps == max(rates.values())
    assert rates[found.knee_threads] >= 0.95 * found.best_bps
    assert all(rates[count] < 0.95 * found.best_bps for count in threads if count < found.knee_threads)
    assert (found.spread is None) == (found.readings < 5)


def test_a_real_measurement_keeps_its_contract_and_reports_progress() -> None:
    shares: list[float] = []
    found = measure_bandwidth((2, 1), usable_bytes=64 * MIB, budget_s=0.8, on_progress=shares.append)
    check_contract(found)
    assert [count for count, _ in found.by_threads] == [1, 2]
    assert GIB / 10 < found.best_bps < 10_000 * GIB
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] <= 1


readings = st.lists(
    st.tuples(st.sampled_from([1, 2, 4, 6, 12]), st.integers(1, 10**12)), min_size=1, max_size=60
)


@given(readings)
def test_any_readings_give_a_curve_that_keeps_its_contract(taken: list[tuple[int, int]]) -> None:
    entries = [{"threads": count, "bps": rate, "nodes": [[0, rate]]} for count, rate in taken]
    found = summarise_readings([{"buffer_bytes": GIB}, *entries])
    check_contract(found)
    assert found.nodes == ()  # one node has no rate of its own
    assert dict(found.by_threads) == {count: max(r for c, r in taken if c == count) for count, _ in taken}
    assert found.spread is None or found.spread >= 0


@given(st.one_of(st.none(), st.integers(1, 8 * GIB)), st.one_of(st.none(), st.integers(0, 1 << 44)))
def test_buffers_stay_within_a_quarter_of_what_is_usable(llc: int | None, usable: int | None) -> None:
    try:
        size = choose_buffer_bytes(llc, usable)
    except HardwareError:
        assert (usable is not None and usable // 4 < max(MIB, 2 * (llc or 0))) or (llc or 0) > 2 * GIB
        return
    assert size <= 4 * GIB
    assert usable is None or size <= usable // 4
    assert size >= 2 * (llc or 0)
    if usable is None or usable >= 64 * GIB:
        assert size >= min(4 * (llc or 0), 4 * GIB)


def test_the_child_takes_no_more_memory_than_it_was_given() -> None:
    found = measure_bandwidth((1, 3), usable_bytes=100 * MIB, budget_s=0.6)
    assert 20 * MIB <= found.buffer_bytes <= 25 * MIB


def test_too_little_memory_to_reach_past_the_cache_is_an_error_and_no_number() -> None:
    with pytest.raises(HardwareError, match="caches hold"):
        measure_bandwidth((1,), llc_bytes=32 * MIB, usable_bytes=128 * MIB)


def test_a_buffer_that_memory_kept_small_is_told() -> None:
    entries = [{"buffer_bytes": 96 * MIB}, {"threads": 1, "bps": 1, "nodes": []}]
    assert "3.0 times the cache" in summarise_readings(entries, llc=32 * MIB).note
    assert summarise_readings(entries, llc=24 * MIB).note == ""


def test_a_deadline_before_the_first_reading_is_an_error() -> None:
    with pytest.raises(HardwareError, match=r"within 0\.01 s"):
        measure_bandwidth((1,), usable_bytes=64 * MIB, limit_s=0.01)


def watch(found: list[Bandwidth | HardwareError], started: threading.Event) -> None:
    """Measure for far too long, tell of the first reading, and keep what comes of it."""
    try:
        found.append(
            measure_bandwidth(
                (1,), usable_bytes=64 * MIB, budget_s=60, on_progress=lambda share: share and started.set()
            )
        )
    except HardwareError as error:
        found.append(error)


def test_what_was_measured_before_the_child_is_killed_counts() -> None:
    found: list[Bandwidth | HardwareError] = []
    started = threading.Event()
    thread = threading.Thread(target=watch, args=(found, started))
    thread.start()
    assert started.wait(30)
    time.sleep(0.4)
    for child in psutil.Process().children():
        child.kill()
    thread.join(10)
    assert isinstance(found[0], Bandwidth)
    check_contract(found[0])
    assert "ended early" in found[0].note


def test_what_was_measured_before_the_limit_counts() -> None:
    found = measure_bandwidth((1,), usable_bytes=64 * MIB, budget_s=60, limit_s=3)
    check_contract(found)
    assert "did not end within 3 s" in found.note


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_the_child_goes_with_its_parent() -> None:
    code = (
        "from qnext.hardware.bandwidth import *; measure_bandwidth((1,), usable_bytes=1 << 26, budget_s=60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    children: list[psutil.Process] = []
    until = time.monotonic() + 30
    while not children and time.monotonic() < until:
        time.sleep(0.05)
        children = psutil.Process(parent.pid).children()
    time.sleep(0.3)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert children
    assert psutil.wait_procs(children, timeout=5)[1] == []


@given(st.integers(1, 512), st.integers(1, 512))
def test_the_sweep_goes_from_one_to_all_with_the_physical_cores(most: int, cores: int) -> None:
    points = sweep_threads(Cpu(usable_logical_cores=most, usable_cores=cores))
    assert list(points) == sorted(set(points))
    assert (points[0], points[-1]) == (1, most)
    assert len(points) <= 7
    assert min(cores, most) in points or min(cores, most) < points[1]


@linux_only
def test_threads_are_pinned_to_their_nodes_and_each_gets_a_rate() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    nodes = {0: frozenset(cpus[:1]), 3: frozenset(cpus[-1:])}
    found = measure_bandwidth((1, 2), nodes=nodes, usable_bytes=64 * MIB, budget_s=0.8)
    check_contract(found)
    assert [node for node, _ in found.nodes] == [0, 3]
    assert all(rate > 0 for _, rate in found.nodes)


@linux_only
def test_a_cpu_that_may_not_be_used_is_an_error_and_no_number() -> None:
    nodes = {0: frozenset({sorted(os.sched_getaffinity(0))[0]}), 1: frozenset({60_000})}
    with pytest.raises(HardwareError):
        measure_bandwidth((2,), nodes=nodes, usable_bytes=64 * MIB, budget_s=0.5)


@linux_only
def test_nodes_without_memory_or_cpus_of_ours_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "sys/devices/system/node"
    ours = sorted(os.sched_getaffinity(0))[0]
    for node, cpus in ((0, f"{ours},60000"), (1, "60001-60004"), (2, ""), (3, str(ours))):
        (folder / f"node{node}").mkdir(parents=True)
        (folder / f"node{node}/cpulist").write_text(cpus + "\n")
    (folder / "has_memory").write_text("0-2\n")
    assert read_node_cpus(tmp_path) == {0: frozenset({ours})}
    assert read_node_cpus(tmp_path / "nothing") == {}


def test_measured_facts_enter_the_machine_with_their_sources() -> None:
    before = Machine(
        memory=Memory(numa_nodes=(NumaNode(0), NumaNode(1), NumaNode(2))),
        sources={"memory.measured_bandwidth_bps": "not measured"},
    )
    found = Bandwidth(90, ((1, 40), (8, 90)), 8, 0.03, ((0, 50), (1, 45)), 6, GIB, "the note")
    after = with_bandwidth(before, found)
    memory = after.memory
    assert (memory.measured_bandwidth_bps, memory.bandwidth_knee_threads, memory.bandwidth_spread) == (
        90,
        8,
        0.03,
    )
    assert memory.bandwidth_by_threads == ((1, 40), (8, 90))
    assert [node.measured_bandwidth_bps for node in memory.numa_nodes or ()] == [50, 45, None]
    said = after.sources["memory.measured_bandwidth_bps"]
    assert all(part in said for part in ("1, 8 threads", "1.00 GiB", "6 readings", "the note"))
    assert "no CPU" in after.sources["memory.numa_nodes.2.measured_bandwidth_bps"]
    assert before.sources["memory.measured_bandwidth_bps"] == "not measured"


def test_the_first_plan_is_not_kept_waiting() -> None:
    assert measured.measure_in_child(1, usable_bytes=64 * MIB) > GIB / 10
