"""The processor on small trees of real machines: kinds of cores, caches, power settings, quotas."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnext.hardware.cpu import detect_cpu
from qnext.hardware.files import parse_cpu_list, parse_number, read_number, read_text
from qnext.hardware.machine import Cpu, Sources
from qnext.hardware.power import read_governor, read_power_profile
from qnext.hardware.topology import parse_cache_size
from qnext.units import KIB, MIB
from tests.machine_trees import CPUS, MACHINES, cores, intel_hybrid, plant, policies, two_socket_epyc

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and /sys trees")


def detect(root: Path, cpus: int = 8) -> tuple[Cpu, Sources]:
    sources = Sources()
    return detect_cpu(sources, root, affinity=frozenset(range(cpus))), sources


@pytest.mark.parametrize(
    ("name", "counts", "llc"),
    [  # sockets, physical, logical, performance, efficiency
        ("intel-hybrid", (1, 16, 24, 8, 8), 30 * MIB),
        ("amd-desktop", (1, 16, 32, 16, 0), 64 * MIB),
        ("two-socket-epyc", (2, 64, 128, 64, 0), 512 * MIB),
        ("arm-big-little", (1, 8, 8, 4, 4), 3 * MIB),
        ("dgx-spark", (1, 20, 20, 10, 10), 24 * MIB),
        ("container", (1, 8, 8, 8, 0), None),
        ("wsl2", (1, 2, 4, 2, 0), 16 * MIB),
        ("empty", (None, None, None, None, None), None),
    ],
)
def test_cores_are_counted_by_kind_and_shared_caches_once(
    tmp_path: Path, name: str, counts: tuple[int | None, ...], llc: int | None
) -> None:
    cpu, sources = detect(plant(tmp_path, MACHINES[name]()))
    seen = (cpu.sockets, cpu.physical_cores, cpu.logical_cores, cpu.performance_cores, cpu.efficiency_cores)
    assert (seen, cpu.llc_bytes) == (counts, llc)
    assert all(sources.values())


def test_a_quota_is_reported_as_it_is_even_below_one_core(tmp_path: Path) -> None:
    cpu, sources = detect(plant(tmp_path, MACHINES["container"]()))
    assert cpu.quota_cores == 0.5
    assert (cpu.usable_cores, cpu.usable_logical_cores) == (1, 1)
    assert sources["cpu.quota_cores"] == "/sys/fs/cgroup"


@pytest.mark.parametrize(
    ("name", "governor", "driver", "profile"),
    [
        ("intel-hybrid", "powersave", "intel_pstate", "balance_performance"),
        ("amd-desktop", "powersave", "amd-pstate-epp", "power"),
        ("two-socket-epyc", "schedutil", "acpi-cpufreq", None),
        ("arm-big-little", "ondemand", "cpufreq-dt", None),
        ("wsl2", None, "", None),
    ],
)
def test_the_most_saving_setting_is_told_with_its_driver(
    tmp_path: Path, name: str, governor: str | None, driver: str, profile: str | None
) -> None:
    cpu, sources = detect(plant(tmp_path, MACHINES[name]()))
    assert (cpu.governor, cpu.power_profile) == (governor, profile)
    assert driver in sources["cpu.governor"]


def test_only_drivers_that_govern_themselves_say_that_the_preference_decides(tmp_path: Path) -> None:
    plant(tmp_path / "a", policies(2, "intel_pstate", ["powersave"]))
    plant(tmp_path / "b", policies(2, "intel_cpufreq", ["powersave"]))
    assert "energy preference decides" in read_governor(tmp_path / "a")[1]
    assert "energy preference decides" not in read_governor(tmp_path / "b")[1]


def test_a_saving_platform_profile_goes_before_the_energy_preference(tmp_path: Path) -> None:
    plant(tmp_path, intel_hybrid() | {"sys/firmware/acpi/platform_profile": "low-power\n"})
    assert read_power_profile(tmp_path)[0] == "low-power"
    plant(tmp_path, {"sys/firmware/acpi/platform_profile": "performance\n"})
    assert read_power_profile(tmp_path)[0] == "balance_performance"


def test_old_kernels_keep_the_governor_with_each_cpu(tmp_path: Path) -> None:
    plant(tmp_path, {f"{CPUS}/cpu{cpu}/cpufreq/scaling_governor": "ondemand" for cpu in range(2)})
    assert read_governor(tmp_path)[0] == "ondemand"


@pytest.mark.parametrize("word", ["", "\0\xff", "<unknown>", "x" * 64, "9 performance"])
def test_a_governor_that_is_no_word_is_none(tmp_path: Path, word: str) -> None:
    plant(tmp_path, {f"{CPUS}/cpufreq/policy0/scaling_governor": word})
    governor, reason = read_governor(tmp_path)
    assert governor is None
    assert reason


@pytest.mark.parametrize(
    "broken", [{"size": "huge"}, {"size": "99999999999999999999G"}, {"shared_cpu_list": "0-"}, {"size": ""}]
)
def test_a_cache_that_is_not_fully_stated_is_none(tmp_path: Path, broken: dict[str, str]) -> None:
    plant(tmp_path, intel_hybrid())
    plant(
        tmp_path,
        {f"{CPUS}/cpu{cpu}/cache/index3/{key}": text for cpu in range(24) for key, text in broken.items()},
    )
    cpu, sources = detect(tmp_path)
    assert cpu.llc_bytes is None
    assert "does not state" in sources["cpu.llc_bytes"]


def test_siblings_that_are_not_there_are_not_counted(tmp_path: Path) -> None:
    plant(tmp_path, cores([(0,), (1,)]))
    plant(tmp_path, {f"{CPUS}/cpu0/topology/core_cpus_list": "0,2-65535"})
    cpu, _ = detect(tmp_path)
    assert (cpu.physical_cores, cpu.logical_cores) == (2, 2)


def test_a_pipe_or_a_directory_in_place_of_a_file_is_empty_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert read_text(tmp_path / "pipe") == read_text(tmp_path) == read_text(tmp_path / "no\0file") == ""
    (tmp_path / "proc").mkdir()
    os.mkfifo(tmp_path / "proc/cpuinfo")
    os.mkfifo(tmp_path / "proc/version")
    assert detect(tmp_path)[0].model is None


def test_no_more_than_the_cap_is_read(tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(b"9" * 3_000_000)
    assert len(read_text(tmp_path / "long")) == 1 << 20
    assert read_number(tmp_path / "long") is None


def test_detection_on_a_large_machine_reads_few_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, two_socket_epyc())
    opened, real = [], os.open

    def counting(path: str, flags: int, *rest: int) -> int:
        opened.append(path)
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", counting)
    detect(tmp_path, 128)
    assert len(opened) < 7 * 128  # about two per core, two per CPU's policy, and the caches


@given(st.text(max_size=40) | st.from_regex(r"[0-9,\- ]{0,20}", fullmatch=True))
def test_any_text_is_a_cpu_list_or_none(text: str) -> None:
    assert all(0 <= number < 1 << 16 for number in parse_cpu_list(text))


@given(st.sets(st.integers(0, 500), min_size=1))
def test_a_cpu_list_reads_back(numbers: set[int]) -> None:
    assert parse_cpu_list(",".join(map(str, sorted(numbers))) + "\n") == numbers


@given(st.text(max_size=30) | st.from_regex(r"[0-9]{0,30}[KMG]?", fullmatch=True))
def test_any_text_is_a_believable_cache_size_or_none(text: str) -> None:
    size = parse_cache_size(text)
    assert size is None or 0 < size <= 8 << 30


@pytest.mark.parametrize(
    ("text", "size"),
    [("36608K\n", 36608 * KIB), ("32M", 32 * MIB), ("512", 512), ("0K", None), ("-1K", None), ("²K", None)],
)
def test_cache_sizes_as_sysfs_writes_them(text: str, size: int | None) -> None:
    assert parse_cache_size(text) == size


@pytest.mark.parametrize("text", ["", "²", "٣", "1" * 21, "9" * 5000, "-1", "0x10", "1.5", "[N/A]"])
def test_what_is_no_ascii_number_of_twenty_digits_is_none(text: str) -> None:
    assert parse_number(text) is None
