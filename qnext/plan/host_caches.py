"""What a server may keep of earlier prompts in the RAM that the plan leaves: a budget, not an afterthought.

llama-server keeps finished prompts (8 GiB by default) and, for models whose memory cannot be rewound
(recurrent state, sliding windows), snapshots of it at points of each conversation (32 per slot). Nobody else
counts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qnext.plan.values import DeviceMemory
from qnext.units import GIB, MIB

MOST_PROMPT_CACHE_BYTES = 8 * GIB
MOST_CHECKPOINTS = 32
"""llama-server's own defaults of `--cache-ram` and `--ctx-checkpoints` (common.h)."""


@dataclass(frozen=True, slots=True)
class HostCaches:
    """`prompt_cache_bytes` for prompts of all slots, a whole number of MiB; `checkpoints` for each slot of
    `checkpoint_bytes` each (0 where the model's memory can be rewound)."""

    prompt_cache_bytes: int
    checkpoints: int
    checkpoint_bytes: int


def plan_host_caches(devices: Sequence[DeviceMemory], slots: int, snapshot: int) -> HostCaches:
    """At most half of the host memory that a plan leaves for snapshots, the rest for earlier prompts.

    `devices` is the plan's memory, host first; `snapshot` the size of one (`cache.snapshot_bytes`).
    """
    host = devices[0]
    spare = max(0, (host.budget_bytes or 0) - host.total_bytes)
    per_step = slots * snapshot
    checkpoints = min(MOST_CHECKPOINTS, spare // 2 // per_step) if per_step else MOST_CHECKPOINTS
    left = min(MOST_PROMPT_CACHE_BYTES, spare - checkpoints * per_step)
    return HostCaches(left // MIB * MIB, checkpoints, snapshot)
