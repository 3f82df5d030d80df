"""Copies between host and device, measured for real: a loopback RPC worker is a device, and so is the CPU."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qnext.engine.build import EngineBuild
from qnext.engine.link import COPIES, Copies, measure_copies, measure_links, watch_link
from qnext.engine.rpc import RpcWorker
from qnext.hardware import Gpu, Machine, Memory
from qnext.units import GIB, MIB

pytestmark = pytest.mark.engine

RTX = Gpu(name="RTX", kind="cuda", index=0, pci_bus_id="0000:01:00.0", h2d_pinned_bps=1)
BUILD = EngineBuild("x", "1", None, "0", ("cpu", "cuda"))
PAGEABLE = {fact for fact in COPIES if "pageable" in fact}


def measure(worker: RpcWorker, **options: object) -> dict[str, Copies]:
    settings = {"most_bytes": 16 * MIB, "budget_s": 0.1, **options}
    return measure_copies("RPC0", rpc_servers=(worker.endpoint,), **settings)  # type: ignore[arg-type]


def test_copies_to_and_from_a_worker_are_timed_each_by_itself() -> None:
    with RpcWorker() as worker:
        copies = measure(worker)
    assert list(copies) == list(COPIES)
    for fact, copy in copies.items():
        if fact in PAGEABLE:
            assert len(copy.samples_ns) >= 3 and min(copy.samples_ns) > 0
            assert copy.bps and 10 * MIB < copy.bps < 1000 * GIB
            assert f"median of {len(copy.samples_ns)} copies of" in copy.source
        else:
            assert copy.bps is None
            assert copy.source == "not measured: this device has no pinned host memory"


def test_the_host_itself_can_be_asked_by_name() -> None:
    copies = measure_copies("CPU", most_bytes=16 * MIB, budget_s=0.05)
    assert all(copies[fact].bps for fact in PAGEABLE)


def after(turns: int, act: Callable[[], None]) -> Callable[[str], None]:
    """A listener that acts when it has been told of `turns` kinds of copies."""
    told: list[str] = []

    def listen(words: str) -> None:
        told.append(words)
        if len(told) == turns:
            act()

    return listen


def test_a_worker_killed_in_the_middle_leaves_what_was_measured_and_a_note() -> None:
    with RpcWorker() as doomed:
        kill = after(3, lambda: os.kill(doomed.pid, signal.SIGKILL))
        copies = measure(doomed, on_progress=kill)
    assert copies["h2d_pageable_bps"].bps
    assert copies["d2h_pageable_bps"].bps is None
    assert "RPC worker went away" in copies["d2h_pageable_bps"].source


@pytest.mark.thorough
def test_a_device_that_hangs_costs_one_deadline() -> None:
    with RpcWorker() as frozen:
        stop = after(2, lambda: os.kill(frozen.pid, signal.SIGSTOP))
        began = time.monotonic()
        copies = measure(frozen, on_progress=stop, deadline_s=3.0)
        assert time.monotonic() - began < 15
    assert all(copy.bps is None for copy in copies.values())
    assert "no sign of life" in copies["d2h_pinned_bps"].source


def test_a_card_the_engine_does_not_have_gets_notes_instead_of_figures() -> None:
    memory = Memory(usable_bytes=4 * GIB)
    measured = measure_links(Machine(gpus=(RTX,), memory=memory), BUILD, deadline_s=20)
    (gpu,) = measured.gpus
    for fact in (*COPIES, "pcie_gen_loaded", "pcie_width_loaded"):
        assert getattr(gpu, fact) is None, fact
    assert measured.sources["gpus.0.d2h_pageable_bps"] == "not measured: the engine has no device CUDA0"
    assert measured.sources["gpus.0.pcie_gen_loaded"] == "not measured: nothing was copied"


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        (Machine(gpus=(replace(RTX, kind="rocm"),)), "this engine build has no hip backend"),
        (Machine(gpus=(replace(RTX, index=None),)), "the engine does not list this card"),
        (Machine(gpus=(RTX,), unified_memory=True), "CPU and GPU share one memory, nothing is copied"),
    ],
)
def test_what_cannot_be_measured_is_not_tried(
    machine: Machine, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qnext.engine.link.EngineSession", None)  # starting one would raise
    measured = measure_links(machine, BUILD)
    assert measured.sources["gpus.0.h2d_pinned_bps"] == f"not measured: {said}"
    assert measured.gpus[0].h2d_pinned_bps is None


def test_a_machine_without_gpus_stays_as_it_is() -> None:
    assert measure_links(Machine(), BUILD) == Machine()


def test_a_link_that_trains_up_under_load_is_seen_at_its_best(tmp_path: Path) -> None:
    card = tmp_path / "sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0"
    card.mkdir(parents=True)
    (tmp_path / "sys/bus/pci/devices").mkdir(parents=True)
    (tmp_path / "sys/bus/pci/devices/0000:01:00.0").symlink_to(card)
    (card / "vendor").write_text("0x10de\n")
    (card / "current_link_width").write_text("8\n")
    with watch_link(RTX, tmp_path) as seen:
        for speed in ("2.5 GT/s PCIe", "16.0 GT/s PCIe", "2.5 GT/s PCIe"):
            wanted = len(seen) + 2
            (card / "current_link_speed").write_text(speed)
            while len(seen) < wanted:
                time.sleep(0.01)
    assert {(1, 8), (4, 8)} == set(seen) - {(None, 8)}
