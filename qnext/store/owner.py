"""Is the process that began a record still there?

A process number alone is reused sooner or later. With the time of its start it is unique until the machine
starts again, and with the number of that start (Linux: `boot_id`) for good. Linux is read directly, because
psutil there adds the clock of the boot, which moves when the clock is set.
"""

from __future__ import annotations

import sys
from pathlib import Path


def process_mark(pid: int) -> str | None:
    """What tells process `pid` from every other that bears the same number; None when it is gone.

    A process of another machine or container that shares the results folder counts as gone: its record
    shows as interrupted until it is finished, then as what it is.
    """
    if sys.platform == "linux":
        return _linux_mark(pid)
    import psutil

    try:
        return f"{psutil.Process(pid).create_time()}"
    except psutil.Error:
        return None


def _linux_mark(pid: int) -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold anything; state is field 3
    if fields[0] in "ZX":
        return None
    return f"{boot} {fields[19]}"  # field 22, start time in clock ticks since boot (proc(5))
