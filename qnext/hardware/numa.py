"""Memory nodes: which RAM hangs on which CPUs (one node per socket, or several per socket on EPYC).

Only the nodes this process may take memory from count: a cpuset (a container, a batch job, taskset's sibling
numactl) may leave some out, and `Mems_allowed_list` in /proc/self/status says which are left. Where new
pages go by default is the process's policy, which `numactl --interleave=all` sets and children inherit.
"""

from __future__ import annotations

import re
from pathlib import Path

from qnext.hardware.files import numbered, parse_cpu_list, read_text
from qnext.hardware.machine import NumaNode
from qnext.units import KIB

_NODES = "sys/devices/system/node"


def read_numa_nodes(
    root: Path = Path("/"), most_bytes: int | None = None
) -> tuple[tuple[NumaNode, ...] | None, str]:
    """(the nodes with RAM that this process may use, source); (None, reason) where the system does not tell.

    `most_bytes` is the machine's RAM: a node that claims more is disbelieved, and the others with it.
    """
    allowed = parse_cpu_list(_status_field(root, "Mems_allowed_list"))
    nodes, left_out, empty = [], 0, 0
    for number, folder in numbered(root / _NODES, "node"):
        found = re.search(r"MemTotal:\s*([0-9]{1,15}) kB", read_text(folder / "meminfo"))
        size = int(found[1]) * KIB if found else None
        if size is None or (most_bytes is not None and size > most_bytes):
            return None, f"/{_NODES}/node{number} states no size, or more than the machine's RAM"
        if size == 0:
            empty += 1
        elif allowed and number not in allowed:
            left_out += 1
        else:
            cpus = read_text(folder / "cpulist")
            alone = cpus.isspace()  # a node of memory alone states an empty list
            nodes.append(NumaNode(number, size, 0 if alone else len(parse_cpu_list(cpus)) or None))
    if not nodes:
        return None, f"/{_NODES} lists no node with RAM"
    notes = [f"/{_NODES}"]
    if left_out:
        notes.append(f"{left_out} more kept from this process by its cpuset")
    if empty:
        notes.append(f"{empty} without RAM")
    return tuple(nodes), ", ".join(notes)


def read_numa_policy(root: Path = Path("/")) -> tuple[str | None, str]:
    """(where this process's new pages go: `default`, `interleave`, `weighted interleave`, `bind`…; source).

    Each mapping without a policy of its own shows the process's, and Python gives none to its mappings.
    """
    text = read_text(root / "proc/self/numa_maps", 4096)
    found = re.search(r"^[0-9a-f]{1,16} ([a-z]+( interleave)?)\b", text, re.MULTILINE)
    return (found[1], "/proc/self/numa_maps") if found else (None, "/proc/self/numa_maps is not shown here")


def _status_field(root: Path, name: str) -> str:
    found = re.search(rf"^{name}:\s*(\S+)$", read_text(root / "proc/self/status"), re.MULTILINE)
    return found[1] if found else ""
