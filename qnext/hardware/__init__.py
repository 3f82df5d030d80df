"""The machine as it is: detected (`detect_machine`) or read from a recording (`load_machine`)."""

from qnext.hardware.detect import detect_machine
from qnext.hardware.machine import (
    Cpu,
    Disk,
    Gpu,
    Machine,
    Memory,
    NumaNode,
    machine_fingerprint,
    machine_to_dict,
)
from qnext.hardware.recorded import list_profiles, load_machine, save_profile
from qnext.hardware.strict_reading import machine_from_dict

__all__ = [
    "Cpu",
    "Disk",
    "Gpu",
    "Machine",
    "Memory",
    "NumaNode",
    "detect_machine",
    "list_profiles",
    "load_machine",
    "machine_fingerprint",
    "machine_from_dict",
    "machine_to_dict",
    "save_profile",
]
