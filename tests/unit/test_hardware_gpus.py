"""GPU sensors that lie, raise, hang or die cost a value, never a traceback or a wrong number.

A stand-in `pynvml` module is put before the real one on the reading child's path, so the child process, its
deadline and its protocol are the real ones.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnext.hardware.gpus import detect_gpus, judge_gpus, normal_bus_id
from qnext.hardware.machine import Gpu, Machine, Sources, facts
from qnext.hardware.nvml import NvmlReport, read_nvml
from qnext.units import GIB, MIB

STAND_IN = """
import time
from types import SimpleNamespace
NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2
class NVMLError(Exception): pass
def nvmlInit(): pass
def nvmlDeviceGetCount(): return 2
def nvmlDeviceGetHandleByIndex(at): return at
def nvmlDeviceGetName(gpu): return "NVIDIA GeForce RTX 5080"
def nvmlDeviceGetUUID(gpu): return f"GPU-{gpu}{gpu}aa"
def nvmlDeviceGetPciInfo(gpu): return SimpleNamespace(busId=f"00000000:0{gpu + 1}:00.0")
def nvmlDeviceGetMemoryInfo(gpu): return SimpleNamespace(total=16303 << 20, free=15000 << 20)
def nvmlDeviceGetCudaComputeCapability(gpu): return (12, 0)
def nvmlSystemGetDriverVersion(): return "580.65"
def nvmlDeviceGetNumGpuCores(gpu): return 10752
def nvmlDeviceGetMaxClockInfo(gpu, kind): return 15001 if kind == 2 else 3090
def nvmlDeviceGetMemoryBusWidth(gpu): return 256
def nvmlDeviceGetCurrPcieLinkGeneration(gpu): return 1
def nvmlDeviceGetMaxPcieLinkGeneration(gpu): return 5
def nvmlDeviceGetCurrPcieLinkWidth(gpu): return 16
def nvmlDeviceGetMaxPcieLinkWidth(gpu): return 16
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call with Python text appended to the stand-in; detection then reads it."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()

    def detect(extra: str = "", environ: dict[str, str] | None = None, deadline_s: float = 20.0) -> Any:
        (tmp_path / "pynvml.py").write_text(STAND_IN + extra)
        sources = Sources()
        gpus = detect_gpus(sources, environ or {}, tmp_path, deadline_s)
        for path, value in facts(Machine(gpus=gpus)):
            assert not path.startswith("gpus.") or value is None or sources[path]
        return gpus, sources

    return detect


linux_only = pytest.mark.skipif(sys.platform == "win32", reason="the driver is looked for under /dev")


@linux_only
def test_a_healthy_card_is_read_in_full(stand_in: Any) -> None:
    gpus, sources = stand_in()
    assert gpus[1] == Gpu(
        name="NVIDIA GeForce RTX 5080",
        kind="cuda",
        index=1,
        pci_bus_id="0000:02:00.0",
        vram_total_bytes=16303 * MIB,
        vram_free_bytes=15000 * MIB,
        rated_bandwidth_bps=960_064_000_000,
        compute_capability="12.0",
        pcie_gen=1,
        pcie_gen_max=5,
        pcie_width=16,
        pcie_width_max=16,
        driver="580.65",
    )
    assert sources["gpus.1.pcie_gen"] == "NVML, drops when idle"
    assert "GPU-" not in str(gpus) + str(sources)  # the serial-like identity is not kept


@linux_only
def test_a_hanging_sensor_costs_one_deadline_and_only_what_comes_after_it(stand_in: Any) -> None:
    hang = "\ndef nvmlDeviceGetCurrPcieLinkGeneration(gpu): time.sleep(60)\n"
    began = time.monotonic()
    gpus, sources = stand_in(hang, deadline_s=4.0)
    assert time.monotonic() - began < 12
    assert [gpu.vram_free_bytes for gpu in gpus] == [15000 * MIB] * 2
    assert gpus[0].pcie_gen is gpus[0].pcie_width_max is None
    assert sources["gpus.0.pcie_gen"] == "NVML did not answer within 4 s"


@linux_only
@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("\ndef nvmlInit(): raise NVMLError('Driver/library version mismatch')\n", "version mismatch"),
        ("\ndef nvmlInit(): time.sleep(60)\n", "did not answer within"),
        ("\ndef nvmlInit(): import os; os.abort()\n", "ended with status -6"),
        ("\nraise ImportError('no such file')\n", "not usable: no such file"),
        ("\ndef nvmlDeviceGetCount(): return 0\n", "lists no GPU"),
    ],
)
def test_a_driver_that_fails_at_once_gives_no_gpu_and_a_reason(stand_in: Any, extra: str, said: str) -> None:
    gpus, sources = stand_in(extra, deadline_s=2.0)
    assert gpus == ()
    assert said in sources["gpus"]


@linux_only
def test_a_raising_or_missing_sensor_costs_only_itself(stand_in: Any) -> None:
    gpus, sources = stand_in(
        "\ndef nvmlDeviceGetMemoryInfo(gpu): raise NVMLError('Not Supported')\n"
        "del nvmlDeviceGetMemoryBusWidth\n"
    )
    assert gpus[0].vram_total_bytes is gpus[0].vram_free_bytes is gpus[0].rated_bandwidth_bps is None
    assert gpus[0].driver == "580.65"
    assert sources["gpus.0.vram_total_bytes"] == "NVML: Not Supported"


@linux_only
@pytest.mark.parametrize(
    ("environ", "buses"),
    [
        ({}, ["0000:01:00.0", "0000:02:00.0"]),
        ({"CUDA_VISIBLE_DEVICES": "1"}, ["0000:02:00.0"]),
        ({"CUDA_VISIBLE_DEVICES": "1, 0"}, ["0000:02:00.0", "0000:01:00.0"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-11"}, ["0000:02:00.0"]),
        ({"CUDA_VISIBLE_DEVICES": "0,7,1"}, ["0000:01:00.0"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, []),
        ({"CUDA_VISIBLE_DEVICES": "MIG-1234"}, []),
    ],
)
def test_only_gpus_cuda_will_show_are_listed(
    stand_in: Any, environ: dict[str, str], buses: list[str]
) -> None:
    gpus, _ = stand_in(environ=environ)
    assert [gpu.pci_bus_id for gpu in gpus] == buses
    assert [gpu.index for gpu in gpus] == list(range(len(buses)))


def card(name: str, bus: str, cores: int) -> dict[str, Any]:
    return {"name": name, "pci_bus_id": bus, "cores": cores, "core_clock": 2500, "vram_total": 8 * GIB}


def test_unequal_cards_are_numbered_fastest_first_unless_told_otherwise() -> None:
    report = NvmlReport(
        values=[card("slow", "0:1:0.0", 3000), card("fast", "0:2:0.0", 9000)], errors=[{}, {}]
    )
    by_speed = judge_gpus(report, Sources(), {"CUDA_VISIBLE_DEVICES": "0"})
    by_bus = judge_gpus(report, Sources(), {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    assert [gpu.name for gpu in by_speed] == ["fast"]
    assert [gpu.name for gpu in by_bus] == ["slow"]


@pytest.mark.parametrize("lie", [0, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF, -1, "[N/A]", None, 1.5, []])
def test_absurd_readings_become_none_with_a_note(lie: object) -> None:
    keys = (
        "vram_total",
        "vram_free",
        "pcie_gen",
        "pcie_width",
        "memory_clock",
        "compute_capability",
        "driver",
    )
    sources = Sources()
    (gpu,) = judge_gpus(
        NvmlReport([{**card("x", "0:1:0.0", 1), **dict.fromkeys(keys, lie)}], [{}]), sources, {}
    )
    assert gpu.vram_total_bytes is gpu.vram_free_bytes is gpu.rated_bandwidth_bps is None
    assert gpu.pcie_gen is gpu.pcie_width is gpu.compute_capability is gpu.driver is None
    assert sources["gpus.0.pcie_gen"] == f"NVML reads {lie!r}, which cannot be"


any_reading = (
    st.none() | st.integers() | st.text(max_size=20) | st.lists(st.integers(), max_size=3) | st.floats()
)


@given(st.dictionaries(st.sampled_from([*card("", "", 0), "vram_free", "uuid", "pcie_gen"]), any_reading))
def test_whatever_nvml_says_free_memory_never_exceeds_total(readings: dict[str, Any]) -> None:
    sources = Sources()
    (gpu,) = judge_gpus(NvmlReport([readings], [{}]), sources, {})
    assert gpu.vram_free_bytes is None or 0 < gpu.vram_free_bytes <= (gpu.vram_total_bytes or 0)
    told = [path for path, value in facts(Machine(gpus=(gpu,))) if path.startswith("gpus") and value]
    assert all(sources[path] for path in told)


def test_bus_ids_of_nvml_and_of_the_engine_agree() -> None:
    assert normal_bus_id("00000000:0A:00.0") == normal_bus_id("0000:0a:00.0") == "0000:0a:00.0"
    assert normal_bus_id("[N/A]") is normal_bus_id(None) is None


def test_reading_without_a_driver_reports_why() -> None:
    report = read_nvml(20.0)
    assert report.values or report.problem
