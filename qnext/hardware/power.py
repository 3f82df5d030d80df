"""How the system trades the CPU's speed for power: the frequency governor and the energy preference.

`powersave` means two things. Under most drivers it holds the lowest frequency, which is a fault here. Under
`intel_pstate` and `amd-pstate-epp` the hardware chooses the frequency by itself, `powersave` is the ordinary
state, and what decides is the energy preference. So the driver's name goes into the governor's source.
https://docs.kernel.org/admin-guide/pm/cpufreq.html, https://docs.kernel.org/admin-guide/pm/amd-pstate.html
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from qnext.hardware.files import numbered, read_text

SELF_GOVERNING_DRIVERS = frozenset({"intel_pstate", "amd-pstate-epp", "amd_pstate_epp"})
"""Drivers under which the hardware chooses the frequency and `powersave` holds nothing down."""

_GOVERNORS = ("powersave", "conservative", "userspace", "ondemand", "schedutil", "performance")
_PREFERENCES = ("power", "balance_power", "default", "balance_performance", "performance")
"""Both from the most saving to the fastest; a name not listed counts as being in the middle."""

SAVING_PLATFORMS = frozenset({"low-power", "quiet", "cool"})
"""Platform profiles that lower the power the CPU may draw."""

_WORD = re.compile(r"[a-z][a-z0-9_-]{0,30}")
_CPUS = "sys/devices/system/cpu"


def read_governor(root: Path = Path("/")) -> tuple[str | None, str]:
    """(cpufreq governor, the most saving one where CPUs differ; source with the driver's name, or reason)."""
    policies = _policies(root)
    names = [_word(policy / "scaling_governor") for policy in policies]
    governor = _most_saving(names, _GOVERNORS)
    if governor is None:
        return None, f"/{_CPUS} has no cpufreq governor: the hardware or the hypervisor decides"
    driver = next((name for policy in policies if (name := _word(policy / "scaling_driver"))), "unknown")
    note = ", under which the energy preference decides" if driver in SELF_GOVERNING_DRIVERS else ""
    differ = ", not the same on all CPUs" if len({name for name in names if name}) > 1 else ""
    return governor, f"cpufreq, driver {driver}{note}{differ}"


def read_power_profile(root: Path = Path("/")) -> tuple[str | None, str]:
    """(energy preference, or the firmware's platform profile; source or reason).

    The preference is the most saving one where CPUs differ. A saving platform profile goes first: it lowers
    the power the CPU may draw, which no preference makes up for.
    """
    preference = _most_saving(
        (_word(policy / "energy_performance_preference") for policy in _policies(root)), _PREFERENCES
    )
    platform = _word(root / "sys/firmware/acpi/platform_profile")
    if platform is not None and (preference is None or platform in SAVING_PLATFORMS):
        beside = f"; energy preference {preference}" if preference else ""
        return platform, f"/sys/firmware/acpi/platform_profile{beside}"
    if preference is not None:
        beside = f"; platform profile {platform}" if platform else ""
        return preference, f"cpufreq energy_performance_preference{beside}"
    return None, "no energy preference in cpufreq and no platform profile in the firmware"


def _policies(root: Path) -> list[Path]:
    """One folder per set of CPUs that share a frequency; reading those of CPUs that are off gives nothing."""
    found = [folder for _, folder in numbered(root / _CPUS / "cpufreq", "policy")]
    return found or [folder / "cpufreq" for _, folder in numbered(root / _CPUS, "cpu")]


def _word(path: Path) -> str | None:
    """The one lower-case word in the file; None for anything else."""
    text = read_text(path, 64).strip()
    return text if _WORD.fullmatch(text) else None


def _most_saving(names: Iterable[str | None], order: tuple[str, ...]) -> str | None:
    def rank(name: str) -> float:
        return order.index(name) if name in order else len(order) / 2

    return min((name for name in names if name), key=rank, default=None)
