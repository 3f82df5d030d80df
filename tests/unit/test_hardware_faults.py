"""Every kind of file that detection reads, made to fail, lie or hang, one at a time.

Nothing may raise or wait, and no fact may come out as another number: it is the healthy one, or None.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qnext.hardware import detect_machine
from qnext.hardware.machine import facts
from tests.machine_trees import MACHINES, plant

if os.name != "posix":
    pytest.skip("FIFOs are POSIX", allow_module_level=True)

CONTENTS = {
    "empty": b"",
    "rubbish": bytes(range(128, 256)) * 4,
    "zero": b"0\n",
    "all ones, 32 bits": b"4294967295\n",
    "all ones, 64 bits": b"18446744073709551615\n",
    "not applicable": b"[N/A]\n",
    "negative": b"-1\n",
}
MOST_SECONDS = 1.0

PLAUSIBLE = {
    "sys/fs/cgroup/memory.max": {"memory.limit_bytes", "memory.usable_bytes"},
    "sys/fs/cgroup/memory.current": {"memory.usable_bytes"},
    "sys/fs/cgroup/cpu.max": {"cpu.usable_cores", "cpu.usable_logical_cores", "cpu.quota_cores"},
    "proc/version": {"cpu.hypervisor"},
    "node/node0/cpulist": {"memory.numa_nodes"},
}
"""A limit whose file is broken cannot be known to be there; other facts are then answered less exactly."""


def broken(path: Path) -> Iterator[str]:
    """Break the file in each way, one at a time, and mend it at the end."""
    content = path.read_bytes()
    path.unlink()
    yield "missing"
    os.mkfifo(path)
    yield "a FIFO that nobody writes to"
    path.unlink()
    path.mkdir()
    yield "a folder"
    path.rmdir()
    for name, wrong in CONTENTS.items():
        path.write_bytes(wrong)
        yield name
    path.write_bytes(content)


def one_of_each(root: Path) -> list[Path]:
    """The files, but of those that differ only by a number (one per CPU) the first alone."""
    kinds = {re.sub(r"\d+", "N", str(path.relative_to(root))): path for path in sorted(root.rglob("*"))[::-1]}
    return [path for path in kinds.values() if path.is_file()]


@pytest.mark.thorough
@pytest.mark.parametrize("name", MACHINES)
def test_a_broken_sensor_costs_its_own_fact_and_no_time(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    root = plant(tmp_path / "root", MACHINES[name]())
    root.mkdir(exist_ok=True)

    def detect() -> dict[str, object]:
        return dict(facts(detect_machine(tmp_path, root=root, environ={})))

    healthy = detect()
    for path in one_of_each(root):
        allowed = next((one for end, one in PLAUSIBLE.items() if str(path).endswith(end)), set())
        for fault in broken(path):
            began = time.monotonic()
            seen = detect()
            assert time.monotonic() - began < MOST_SECONDS, (path, fault)
            for fact, value in seen.items():
                if fact in allowed or fact.startswith("disk.") or value is None or value == ():
                    continue
                assert value == healthy[fact], (path, fault, fact)
