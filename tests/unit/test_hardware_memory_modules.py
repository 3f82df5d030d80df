"""Memory modules: slots from udev and SMBIOS, channels from the boards' labels, and no guess beyond them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnext.hardware.dmi import NEEDS_ROOT, TABLE, UDEV, Slot, parse_table, parse_udev, read_slots
from qnext.hardware.machine import Memory, Sources
from qnext.hardware.memory import detect_memory
from qnext.hardware.modules import judge_modules, name_channels
from qnext.units import GIB
from tests.machine_trees import MACHINES, array, ddr5, device, end, meminfo, plant, udev

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and /sys trees")


def detect(root: Path) -> tuple[Memory, Sources]:
    sources = Sources()
    return detect_memory(sources, root), sources


def dimm(locator: str, bank: str = "", gib: int = 16, **facts: object) -> Slot:
    stated = {"width_bits": 64, "speed_mtps": 4800, "configured_mtps": 4800, "kind": "DDR5"} | facts
    return Slot(size_bytes=gib * GIB or None, locator=locator, bank=bank, **stated)  # type: ignore[arg-type]


@linux_only
@pytest.mark.parametrize(
    ("name", "expected"),
    [  # modules, channels, of the board, MT/s, the modules' rating, bytes per second
        ("intel-hybrid", (2, 2, 2, 4800, 4800, 76_800_000_000)),
        ("amd-desktop", (2, 2, 2, 6000, 6000, 96_000_000_000)),
        ("two-socket-epyc", (16, 16, 16, 2933, 3200, 375_424_000_000)),
        ("dgx-spark", (None,) * 6),
        ("wsl2", (None,) * 6),
        ("empty", (None,) * 6),
    ],
)
def test_modules_of_real_machines(tmp_path: Path, name: str, expected: tuple[int | None, ...]) -> None:
    memory, sources = detect(plant(tmp_path, MACHINES[name]()))
    assert expected == (
        memory.modules,
        memory.channels,
        memory.channels_max,
        memory.speed_mtps,
        memory.speed_max_mtps,
        memory.rated_bandwidth_bps,
    )
    assert all(sources.values())


@linux_only
def test_what_udev_decoded_comes_before_the_table_and_names_no_serial_number(tmp_path: Path) -> None:
    plant(tmp_path, MACHINES["amd-desktop"]() | {TABLE: array(1) + device(1024, "X", "Y") + end()})
    memory, sources = detect(tmp_path)
    assert memory.modules == 2
    assert "udev" in sources["memory.modules"]
    assert "SECRET" not in repr(memory) + repr(sources) + repr(read_slots(tmp_path))


@linux_only
def test_the_separate_entries_of_dmi_sysfs_do_where_the_table_is_missing(tmp_path: Path) -> None:
    entries = {
        f"sys/firmware/dmi/entries/17-{n}/raw": device(8192, f"DIMM_{'AB'[n]}1", "BANK 0") for n in (0, 1)
    }
    plant(
        tmp_path, entries | {"sys/firmware/dmi/entries/16-0/raw": array(2), "proc/meminfo": meminfo(15 * GIB)}
    )
    memory, _ = detect(tmp_path)
    assert (memory.modules, memory.channels) == (2, 2)


@linux_only
def test_an_unreadable_table_needs_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, {TABLE: b"", "proc/meminfo": meminfo(GIB)})
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.F_OK)
    _, sources = detect(tmp_path)
    assert sources["memory.modules"] == sources["memory.rated_bandwidth_bps"] == NEEDS_ROOT


@linux_only
def test_the_modules_of_a_virtual_machine_are_not_believed(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/cpuinfo": "flags : fpu hypervisor\n",
            "proc/meminfo": meminfo(8 * GIB),
            UDEV: udev([{"LOCATOR": "DIMM A1", **ddr5(8, 4800, 4800)}]),
        },
    )
    memory, sources = detect(tmp_path)
    assert memory.modules is memory.speed_mtps is memory.rated_bandwidth_bps is None
    assert "virtual machine" in sources["memory.modules"]


@pytest.mark.parametrize(
    ("labels", "channels"),
    [  # (bank, locator) of every slot; None: cannot be told
        ([("P0 CHANNEL A", "DIMM 0"), ("P0 CHANNEL A", "DIMM 1"), ("P0 CHANNEL B", "DIMM 0")], 2),
        ([("BANK 0", "ChannelA-DIMM0"), ("BANK 2", "ChannelB-DIMM0")], 2),
        ([("ChannelA-DIMM0", "DIMM 1"), ("ChannelB-DIMM0", "DIMM 2")], 2),
        ([("BANK 0", "Controller0-ChannelA-DIMM0"), ("BANK 0", "Controller1-ChannelA-DIMM0")], 2),
        ([("BANK 0", "Controller0-ChannelA-DIMM0"), ("BANK 1", "Controller0-ChannelB-DIMM0")], 1),
        ([("BANK 0", "Controller0-DIMM1"), ("BANK 0", "Controller1-DIMM1")], 2),
        ([("P0_Node0_Channel0_Dimm0", "P1-DIMMA1"), ("P1_Node0_Channel0_Dimm0", "P2-DIMMA1")], 2),
        ([("_Node0_Channel3_Dimm0", "DIMM030 J4"), ("_Node1_Channel3_Dimm0", "DIMM130 J40")], 2),
        ([("NODE 1 CHANNEL 2 DIMM 0", "DIMM_J1"), ("NODE 1 CHANNEL 2 DIMM 1", "DIMM_J2")], 1),
        ([("P0 CHANNEL Q", "CPU0_DIMM_Q1"), ("P1 CHANNEL Q", "CPU1_DIMM_Q1")], 2),
        ([("NODE 0", "CPU0_DIMM_C1"), ("NODE 4", "CPU1_DIMM_C1")], 2),
        ([("NODE 0", "CPU0_C0D0"), ("NODE 0", "CPU0_C0D1"), ("NODE 0", "CPU0_C1D0")], 2),
        ([("BANK 0", "DIMM_P0_A0"), ("BANK 1", "DIMM_P0_A1"), ("BANK 0", "DIMM_P1_A0")], 2),
        ([("BANK 0", "DIMM_A1"), ("BANK 1", "DIMM_A2"), ("BANK 2", "DIMM_B1"), ("BANK 3", "DIMM_B2")], 2),
        ([("BANK 0", "DDR4-A1"), ("BANK 1", "DDR4-B1")], 2),
        ([("", "DIMM A"), ("", "DIMM B")], 2),
        (
            [("", f"DIMM_{letter}{n}") for letter in "AB" for n in range(1, 13)],
            None,
        ),  # a letter per processor
        ([("", f"DIMM_A{n}") for n in (1, 2)], None),
        ([("", f"A{n}") for n in (1, 2)], None),
        ([("A1_BANK0", "A1_DIMM0"), ("A1_BANK1", "A1_DIMM1")], None),
        ([("", "PROC 1 DIMM 1"), ("", "PROC 1 DIMM 4")], None),
        ([("BANK 0", "DIMM 0"), ("BANK 1", "DIMM 1")], None),
        ([("", "XMM1"), ("", "XMM3")], None),
        ([("P0 CHANNEL A", "DIMM 0"), ("P0 CHANNEL A", "DIMM 0")], None),  # the same label twice
        ([("P0 CHANNEL A", "DIMM 0"), ("Other", "SYSTEM BOARD")], None),
    ],
)
def test_channels_are_read_from_labels_or_not_at_all(
    labels: list[tuple[str, str]], channels: int | None
) -> None:
    slots = [dimm(locator, bank) for bank, locator in labels]
    names = name_channels(slots)
    assert (None if names is None else len(set(names))) == channels
    assert judge_modules(slots, len(slots) * 16 * GIB).channels == channels


def test_an_empty_slot_counts_for_the_board_and_not_for_the_channels_in_use() -> None:
    slots = [dimm("DIMM_A1", gib=0), dimm("DIMM_A2"), dimm("DIMM_B1", gib=0), dimm("DIMM_B2", gib=0)]
    judged = judge_modules(slots, 16 * GIB)
    assert (judged.modules, judged.channels, judged.channels_max) == (1, 1, 2)
    assert judged.rated_bandwidth_bps == 38_400_000_000


@pytest.mark.parametrize(("width", "count", "channels"), [(32, 8, 4), (16, 8, 2), (32, 1, 1), (64, 2, 2)])
def test_narrow_channels_are_counted_in_64_bits_and_rated_as_they_are(
    width: int, count: int, channels: int
) -> None:
    slots = [
        dimm("DIMM 0", f"P0 CHANNEL {letter}", width_bits=width, kind="LPDDR5")
        for letter in "ABCDEFGH"[:count]
    ]
    judged = judge_modules(slots, count * 16 * GIB)
    assert judged.channels == channels
    assert judged.rated_bandwidth_bps == count * width // 8 * 4800 * 1_000_000


@pytest.mark.parametrize(
    ("kind", "rating", "setting", "expected"),
    [
        ("DDR5", 5600, 6000, (6000, 6000)),  # a memory profile beyond the stated rating
        ("DDR5", 4800, 3600, (3600, 4800)),  # four modules
        ("DDR4", 2400, 1600, (1600, 2400)),
        ("DDR4", 2666, 1333, (2666, 2666)),  # the clock in place of the transfers
        ("DDR4", 3200, 1600, (3200, 3200)),
        ("DDR5", 2400, 2400, (4800, 4800)),
        ("DDR5", None, 4800, (4800, None)),
        ("DDR5", 4800, None, (None, 4800)),
    ],
)
def test_speeds_are_transfers_and_the_rating_is_never_below_them(
    kind: str, rating: int | None, setting: int | None, expected: tuple[int | None, int | None]
) -> None:
    slots = [
        dimm(f"DIMM_{letter}1", kind=kind, speed_mtps=rating, configured_mtps=setting) for letter in "AB"
    ]
    judged = judge_modules(slots, 32 * GIB)
    assert (judged.speed_mtps, judged.speed_max_mtps) == expected
    assert (judged.rated_bandwidth_bps is None) == (expected[0] is None)


def test_the_slowest_module_sets_the_pace_and_an_unknown_one_leaves_it_open() -> None:
    mixed = [dimm("DIMM_A1", configured_mtps=4800), dimm("DIMM_B1", configured_mtps=4000)]
    assert judge_modules(mixed, 32 * GIB).speed_mtps == 4000
    unknown = [dimm("DIMM_A1"), dimm("DIMM_B1", configured_mtps=None)]
    judged = judge_modules(unknown, 32 * GIB)
    assert judged.speed_mtps is judged.rated_bandwidth_bps is None
    assert judged.notes["rated_bandwidth_bps"] == judged.notes["speed_mtps"]


@pytest.mark.parametrize(("total", "believed"), [(15, True), (16, True), (4, True), (17, False), (3, False)])
def test_modules_must_agree_with_the_systems_ram(total: int, believed: bool) -> None:
    judged = judge_modules([dimm("DIMM A")], total * GIB)
    assert (judged.modules == 1) is believed
    assert believed or "do not agree" in judged.notes["channels"]


@pytest.mark.parametrize("other", [{"kind": "DDR4"}, {"width_bits": None}, {"width_bits": 32}])
def test_modules_that_differ_leave_the_channels_open(other: dict[str, object]) -> None:
    judged = judge_modules([dimm("DIMM_A1"), dimm("DIMM_B1", **other)], 32 * GIB)
    assert judged.channels is judged.rated_bandwidth_bps is None
    assert judged.notes["channels"] == judged.notes["rated_bandwidth_bps"] != ""


def test_the_table_gives_sizes_and_speeds_from_their_long_fields_too() -> None:
    table = (
        array(4) + device(65536, "DIMM_A1", "BANK 0", speed=70000, configured=5600, total_width=80) + end()
    )
    assert parse_table(table) == (Slot(64 * GIB, 64, None, 5600, "DDR5", "DIMM_A1", "BANK 0"),)
    assert parse_table(array(1) + device(1024, "A", "B", length=0x15))[0].speed_mtps is None


def test_only_devices_of_system_memory_that_are_ram_count() -> None:
    table = (
        array(2) + array(1, use=4, handle=0x2000)
        + device(8192, "DIMM_A1", "BANK 0")
        + device(256, "VIDEO", "", array_handle=0x2000)
        + device(16, "FLASH", "", kind=0x09)
        + device(131072, "DIMM_B1", "BANK 1", technology=7)
        + end()
        + device(8192, "beyond the end", "")
    )  # fmt: skip
    assert [slot.locator for slot in parse_table(table)] == ["DIMM_A1"]


def test_optane_and_flash_are_no_ram_for_udev_either() -> None:
    text = udev(
        [
            {"LOCATOR": "A", **ddr5(16, 4800, 4800)},
            {
                "LOCATOR": "B",
                "MEMORY_TECHNOLOGY": "Intel Optane DC persistent memory",
                "SIZE": str(128 * GIB),
            },
            {"LOCATOR": "C", "TYPE": "Flash", "SIZE": str(GIB)},
        ]
    )
    assert [slot.locator for slot in parse_udev(text)] == ["A"]


@pytest.mark.parametrize("lie", ["0", "4294967295", "65535", "[N/A]", "", "-1", "9" * 5000, "²"])
def test_absurd_figures_are_not_passed_on(lie: str) -> None:
    keys = ("SIZE", "DATA_WIDTH", "SPEED_MTS", "CONFIGURED_SPEED_MTS")
    slots = parse_udev(udev([{"LOCATOR": "DIMM A", **dict.fromkeys(keys, lie)}]))
    for slot in slots:
        assert slot.width_bits is slot.speed_mtps is slot.configured_mtps is None
    assert judge_modules(slots, 16 * GIB).rated_bandwidth_bps is None


VALID = array(2) + device(8192, "DIMM_A1", "BANK 0") + device(8192, "DIMM_B1", "BANK 1") + end()


def believable(slots: tuple[Slot, ...], total: int | None) -> None:
    judged = judge_modules(slots, total)
    assert judged.rated_bandwidth_bps is None or 0 < judged.rated_bandwidth_bps < 10**15
    assert judged.channels is None or 0 < judged.channels <= max(1, 4 * len(slots))
    if judged.rated_bandwidth_bps is None:
        assert judged.notes["rated_bandwidth_bps"]


@given(st.binary(max_size=400), st.none() | st.integers(0, 1 << 60))
def test_any_bytes_are_slots_or_none(data: bytes, total: int | None) -> None:
    believable(parse_table(data), total)


@given(st.integers(0, len(VALID)), st.binary(min_size=1, max_size=8))
def test_a_damaged_table_is_read_without_an_error(place: int, damage: bytes) -> None:
    believable(parse_table(VALID[:place] + damage + VALID[place + len(damage) :]), 16 * GIB)
    believable(parse_table(VALID[:place]), 16 * GIB)


UDEV_LINES = st.tuples(
    st.integers(0, 99999),
    st.sampled_from(
        ["SIZE", "LOCATOR", "BANK_LOCATOR", "DATA_WIDTH", "SPEED_MTS", "TYPE", "CONFIGURED_SPEED_MTS"]
    ),
    st.text(max_size=20) | st.integers().map(str),
).map(lambda line: f"E:MEMORY_DEVICE_{line[0]}_{line[1]}={line[2]}")


@pytest.mark.thorough
@given(
    st.lists(UDEV_LINES, max_size=30).map("\n".join) | st.text(max_size=300),
    st.none() | st.integers(0, 1 << 60),
)
def test_any_text_is_slots_or_none(text: str, total: int | None) -> None:
    believable(parse_udev(text), total)
