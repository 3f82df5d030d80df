"""Cards without NVML, and every card's link, read from small /sys trees of known machines.

The trees follow how Linux shows these machines: a device's folder lies inside that of the port above it, and
/sys/bus/pci/devices links to all of them.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from qnext.hardware import sysfs_gpus
from qnext.hardware.gpus import detect_gpus, judge_gpus
from qnext.hardware.machine import Gpu, Sources
from qnext.hardware.nvml import NvmlReport
from qnext.hardware.pcie import Link, read_link
from qnext.hardware.sysfs_gpus import read_bus
from qnext.units import GIB, MIB

SPEED = {1: "2.5 GT/s PCIe", 3: "8.0 GT/s PCIe", 4: "16.0 GT/s PCIe", 5: "32.0 GT/s PCIe"}


class Board:
    """A /sys tree below `root`. `add` returns the new device's folder, to be the parent of the next."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "sys/bus/pci/devices").mkdir(parents=True)

    def add(
        self,
        bus_id: str,
        vendor: str,
        kind: str = "0x060400",
        *,
        below: Path | None = None,
        now: tuple[int, int] | None = None,
        most: tuple[int, int] | None = None,
        **files: str,
    ) -> Path:
        folder = (below or self.root / "sys/devices/pci0000:00") / bus_id
        folder.mkdir(parents=True)
        (self.root / "sys/bus/pci/devices" / bus_id).symlink_to(folder)
        for side, link in (("current", now), ("max", most)):
            if link:
                files[f"{side}_link_speed"], files[f"{side}_link_width"] = SPEED[link[0]], str(link[1])
        for name, text in {"vendor": vendor, "class": kind, **files}.items():
            (folder / name).write_text(text + "\n")
        return folder

    def card(self, folder: Path, driver: str, node: str = "renderD128", hwmon: dict[str, str] = {}) -> None:  # noqa: B006
        """Bind a driver: render node in /sys and /dev, and hwmon files."""
        (folder / "driver").symlink_to(self.root / f"sys/bus/pci/drivers/{driver}")
        (folder / "drm" / node).mkdir(parents=True)
        (self.root / "dev/dri").mkdir(parents=True, exist_ok=True)
        (self.root / "dev/dri" / node).touch()
        (folder / "hwmon/hwmon4").mkdir(parents=True)
        for name, text in hwmon.items():
            (folder / "hwmon/hwmon4" / name).write_text(text + "\n")

    def detect(self) -> tuple[tuple[Gpu, ...], Sources]:
        sources = Sources()
        gpus = detect_gpus(sources, {}, self.root)
        for position, gpu in enumerate(gpus):
            for name in Gpu.__dataclass_fields__:
                assert getattr(gpu, name) is None or sources[f"gpus.{position}.{name}"], name
        return gpus, sources


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path)


def add_7900_xtx(board: Board, slot: tuple[int, int] = (4, 8), **files: str) -> Path:
    """The card behind its own switch (1002:1478 above 1002:1479), in an x8 slot of an AMD board."""
    port = board.add("0000:00:01.1", "0x1022", now=slot, most=slot)
    upper = board.add("0000:01:00.0", "0x1002", below=port, now=slot, most=(4, 16))
    lower = board.add("0000:02:00.0", "0x1002", below=upper, now=(4, 16), most=(4, 16))
    card = board.add(
        "0000:03:00.0",
        "0x1002",
        "0x030000",
        below=lower,
        now=(4, 16),
        most=(4, 16),
        device="0x744c",
        revision="0xc8",
        mem_info_vram_total=str(24 * GIB),
        mem_info_vram_used=str(700 * MIB),
        pp_dpm_sclk="0: 500Mhz *\n1: 2371Mhz",
        pp_dpm_mclk="0: 96Mhz *\n1: 456Mhz\n2: 1249Mhz",
        **files,
    )
    board.add("0000:03:00.1", "0x1002", "0x040300", below=lower)
    hwmon = {
        "power1_cap": "250000000",
        "power1_cap_default": "327000000",
        "power1_cap_max": "376000000",
    }
    board.card(card, "amdgpu", hwmon=hwmon)
    return card


def test_a_7900_xtx_behind_its_own_switch_is_in_the_slot_it_is_in(board: Board) -> None:
    add_7900_xtx(board)
    (board.root / "usr/share/libdrm").mkdir(parents=True)
    (board.root / "usr/share/libdrm/amdgpu.ids").write_text(
        "# ids\n1.0.0\n744C,\tC0,\tSomething else\n744C,\tC8,\tAMD Radeon RX 7900 XTX\n"
    )
    (gpu,), sources = board.detect()
    assert gpu == Gpu(
        name="AMD Radeon RX 7900 XTX",
        kind="rocm",
        pci_bus_id="0000:03:00.0",
        vram_total_bytes=24 * GIB,
        vram_free_bytes=24 * GIB - 700 * MIB,
        vram_others_bytes=700 * MIB,
        driver="amdgpu",
        pcie_gen=4,
        pcie_width=8,
        pcie_gen_max=4,
        pcie_width_max=8,
        pcie_gen_card_max=4,
        pcie_width_card_max=16,
        pcie_gen_slot_max=4,
        pcie_width_slot_max=8,
        power_limit_w=250,
        power_default_w=327,
        power_max_w=376,
        core_clock_mhz=500,
        core_clock_max_mhz=2371,
        memory_clock_mhz=96,
        memory_clock_max_mhz=1249,
    )
    assert sources["gpus.0.index"] == "the engine has not listed this card"
    assert sources["gpus"] == "no NVIDIA driver on this machine; sysfs lists 1"


def add_arc(board: Board, below_slot: tuple[int, int] = (4, 16)) -> Path:
    """An A770 behind its own switch; the processor's root port is Intel's as well."""
    port = board.add("0000:00:06.0", "0x8086", now=below_slot, most=below_slot)
    upper = board.add("0000:08:00.0", "0x8086", below=port, now=(4, 16), most=(4, 16))
    lower = board.add("0000:09:01.0", "0x8086", below=upper, now=(1, 1), most=(1, 1))
    card = board.add(
        "0000:0a:00.0", "0x8086", "0x030000", below=lower, now=(1, 1), most=(1, 1), device="0x56a0"
    )
    board.card(card, "i915", hwmon={"power1_max": "190000000", "power1_rated_max": "190000000"})
    return card


def test_an_arc_has_the_link_of_its_slot_and_no_stated_memory(board: Board) -> None:
    add_arc(board)
    (board.root / "usr/share/misc").mkdir(parents=True)
    (board.root / "usr/share/misc/pci.ids").write_text(
        "# table\n1002  AMD\n\t56a0  Not this one\n8086  Intel Corporation\n\t1234  Other\n"
        "\t\t8086 0001  Sub\n\t56a0  DG2 [Arc A770]\n8087  Next\n"
    )
    (gpu,), sources = board.detect()
    assert (gpu.name, gpu.kind, gpu.driver) == ("Intel DG2 [Arc A770]", "sycl", "i915")
    assert (gpu.pcie_gen, gpu.pcie_width, gpu.pcie_gen_max, gpu.pcie_width_max) == (4, 16, 4, 16)
    assert (gpu.pcie_gen_slot_max, gpu.pcie_width_slot_max) == (4, 16)
    assert (gpu.power_limit_w, gpu.power_default_w) == (190, 190)
    assert gpu.vram_total_bytes is gpu.vram_free_bytes is None
    assert sources["gpus.0.vram_total_bytes"] == "the driver i915 does not tell"


def add_apu(board: Board, vram: int = 512 * MIB) -> None:
    port = board.add("0000:00:08.1", "0x1022", now=(4, 16), most=(4, 16))
    card = board.add(
        "0000:c1:00.0",
        "0x1002",
        "0x030000",
        below=port,
        now=(4, 16),
        most=(4, 16),
        device="0x15bf",
        revision="0xc1",
        mem_info_vram_total=str(vram),
        mem_info_vram_used=str(100 * MIB),
    )
    board.add("0000:c1:00.2", "0x1022", "0x108000", below=port)
    board.card(card, "amdgpu", "renderD129")


@pytest.mark.parametrize("vram", [512 * MIB, 96 * GIB])
def test_a_processors_own_gpu_is_no_gpu_with_vram_however_much_is_set_aside(board: Board, vram: int) -> None:
    add_apu(board, vram)
    gpus, sources = board.detect()
    assert gpus == ()
    assert "the GPU in the AMD processor shares the RAM" in sources["gpus"]


def test_intel_graphics_on_the_root_bus_are_the_processors(board: Board) -> None:
    folder = board.add("0000:00:02.0", "0x8086", "0x030000", device="0x9bc4")
    board.card(folder, "i915")
    gpus, sources = board.detect()
    assert gpus == () and "Intel processor shares the RAM" in sources["gpus"]


def test_of_a_laptops_two_gpus_only_the_card_counts(board: Board) -> None:
    add_apu(board)
    add_7900_xtx(board)
    gpus, _ = board.detect()
    assert [gpu.pci_bus_id for gpu in gpus] == ["0000:03:00.0"]


def test_an_x16_card_in_an_x4_slot(board: Board) -> None:
    port = board.add("0000:00:1c.0", "0x8086", now=(3, 4), most=(3, 4))
    board.add("0000:01:00.0", "0x10de", "0x030000", below=port, now=(1, 4), most=(5, 16), device="0x2c02")
    assert read_link("0000:01:00.0", board.root) == Link(
        gen=1, width=4, card_gen_max=5, card_width_max=16, slot_gen_max=3, slot_width_max=4
    )
    sources = Sources()
    report = NvmlReport([{"pci_bus_id": "00000000:01:00.0", "pcie_gen": 1, "pcie_width": 0}], [{}])
    (gpu,) = judge_gpus(report, sources, {}, read_bus(board.root))
    assert (gpu.pcie_gen_slot_max, gpu.pcie_width_slot_max, gpu.pcie_width_card_max) == (3, 4, 16)
    assert (gpu.pcie_gen, sources["gpus.0.pcie_gen"]) == (1, "NVML, drops when idle")
    assert gpu.pcie_width == 4  # NVML said 0 lanes, which cannot be; the bus knows
    assert sources["gpus.0.pcie_width"].startswith("sysfs")


@pytest.mark.parametrize("vendor", ["0x1b36", "0x15ad"])
def test_what_an_emulated_slot_says_is_not_believed(board: Board, vendor: str) -> None:
    port = board.add("0000:00:05.0", vendor, now=(1, 1), most=(1, 1))
    board.add("0000:01:00.0", "0x10de", "0x030200", below=port, now=(4, 16), most=(4, 16))
    link = read_link("0000:01:00.0", board.root)
    assert link is not None
    assert (link.slot_gen_max, link.slot_width_max, link.width) == (None, None, 16)


@pytest.mark.parametrize("speed", ["Unknown", "", "0", "255", "2.5.5 GT/s", "x" * 100_000])
@pytest.mark.parametrize("width", ["255", "63", "0", "-1", "", "x16", "\u0664", "9" * 5000])
def test_a_card_that_fell_off_the_bus_has_no_link(board: Board, speed: str, width: str) -> None:
    files = {f"{side}_link_{what}": text for side in ("current", "max") for what, text in
             (("speed", speed), ("width", width))}  # fmt: skip
    port = board.add("0000:00:01.0", "0x8086", **files)
    board.add("0000:01:00.0", "0x10de", "0x030000", below=port, **files)
    assert read_link("0000:01:00.0", board.root) == Link()


def test_a_card_a_container_may_not_use_is_not_counted(board: Board) -> None:
    add_7900_xtx(board)
    (board.root / "dev/dri/renderD128").unlink()
    gpus, sources = board.detect()
    assert gpus == () and "no render node in /dev/dri" in sources["gpus"]


def test_a_card_without_a_driver_is_mentioned(board: Board) -> None:
    board.add("0000:03:00.0", "0x10de", "0x030000", device="0x2684")
    board.add("0000:04:00.0", "0x1002", "0x030000", device="0x744c", mem_info_vram_total=str(24 * GIB))
    gpus, sources = board.detect()
    assert gpus == ()
    assert sources["gpus"] == (
        "an NVIDIA card is on the bus, but its driver is not loaded; an AMD card has no driver loaded"
    )


LIES = ["", "0", "4294967295", "18446744073709551615", "[N/A]", "-1", "\u0664\u0662", "9" * 5000, "\0"]


@pytest.mark.parametrize("lie", LIES)
def test_each_file_may_lie(board: Board, lie: str) -> None:
    card = add_7900_xtx(board)
    (healthy,), _ = board.detect()
    files = [path for path in card.rglob("*") if path.is_file() and path.name not in ("vendor", "class")]
    assert len(files) > 10
    for path in files:
        kept = path.read_text()
        path.write_text(lie)
        for gpu in board.detect()[0]:
            for name in Gpu.__dataclass_fields__:
                fact, good = getattr(gpu, name), getattr(healthy, name)
                used_nothing = path.name == "mem_info_vram_used" and lie == "0" and name.startswith("vram")
                assert fact in (None, good) or name == "name" or used_nothing, (path.name, name, fact)
        path.write_text(kept)


def test_each_file_may_be_missing(board: Board) -> None:
    card = add_7900_xtx(board)
    (healthy,), _ = board.detect()
    for path in [path for path in card.rglob("*") if path.is_file()]:
        kept = path.read_text()
        path.unlink()
        for gpu in board.detect()[0]:
            wrong = [
                name
                for name in Gpu.__dataclass_fields__
                if getattr(gpu, name) not in (None, getattr(healthy, name)) and name != "name"
            ]
            assert wrong == [], path.name
        path.write_text(kept)


def test_a_driver_that_hangs_costs_one_deadline_and_its_own_facts(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_7900_xtx(board)
    add_arc(board)
    real, released = sysfs_gpus.read_number, threading.Event()

    def hang(path: Path) -> Any:
        if path.name == "mem_info_vram_used":
            released.wait(30)
        return real(path)

    monkeypatch.setattr(sysfs_gpus, "read_number", hang)
    began = time.monotonic()
    sources = Sources()
    gpus = detect_gpus(sources, {}, board.root, 0.5)
    released.set()
    assert time.monotonic() - began < 5
    (gpu,) = gpus
    assert (gpu.vram_total_bytes, gpu.vram_free_bytes, gpu.pcie_width) == (24 * GIB, None, 8)
    assert sources["gpus.0.vram_free_bytes"] == "a graphics driver did not answer within 0.5 s"
    assert "an Intel card is not counted: nothing is known of it" in sources["gpus"]
