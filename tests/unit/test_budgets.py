"""How much of each memory may be used: what was named is taken as it is, the rest with a margin."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnext.errors import HardwareError, UsageError
from qnext.hardware.machine import Gpu, Machine, Memory
from qnext.plan.budgets import make_budgets
from qnext.plan.values import Budget
from qnext.units import GIB, MIB


def machine(ram: int | None = 64 * GIB, *gpus: Gpu, unified: bool | None = None) -> Machine:
    return Machine(memory=Memory(usable_bytes=ram), gpus=gpus, unified_memory=unified)


CARD = Gpu(kind="cuda", index=0, vram_free_bytes=12 * GIB)


@given(st.integers(0, 4096 * GIB))
def test_margin_is_between_its_limits_and_nothing_goes_below_zero(ram: int) -> None:
    (host,) = make_budgets(machine(ram))
    assert 0 <= host.budget_bytes <= ram
    left = ram - host.budget_bytes
    assert left == ram or 192 * MIB <= left <= GIB


def test_named_budgets_are_taken_as_they_are() -> None:
    budgets = make_budgets(machine(64 * GIB, CARD), ram=10 * GIB, vram=3 * GIB)
    assert [budget.budget_bytes for budget in budgets] == [10 * GIB, 3 * GIB]
    one = make_budgets(machine(64 * GIB, CARD), device_memory={"CUDA0": GIB, "CPU": 2 * GIB})
    assert [budget.budget_bytes for budget in one] == [2 * GIB, GIB]


def test_limit_of_the_cgroup_counts_and_not_the_machine() -> None:
    memory = Memory(total_bytes=64 * GIB, available_bytes=50 * GIB, usable_bytes=4 * GIB)
    assert make_budgets(Machine(memory=memory))[0].budget_bytes < 4 * GIB


@pytest.mark.parametrize(
    ("kind", "name"), [("cuda", "CUDA0"), ("rocm", "ROCm0"), ("vulkan", "Vulkan0"), ("metal", "MTL0")]
)
def test_devices_have_the_engines_names(kind: str, name: str) -> None:
    assert make_budgets(machine(GIB, Gpu(kind=kind, vram_free_bytes=GIB)))[1].name == name


def test_rpc_device_needs_a_size_and_its_buffer_is_named_by_its_worker() -> None:
    servers = ("10.0.0.1:1", "10.0.0.2:2")
    sizes = {"RPC0": GIB, "RPC1": 2 * GIB}
    assert make_budgets(machine(), rpc_servers=servers, device_memory=sizes)[1:] == (
        Budget("RPC0", "rpc", GIB, "RPC0[10.0.0.1:1]"),
        Budget("RPC1", "rpc", 2 * GIB, "RPC0[10.0.0.2:2]"),
    )
    with pytest.raises(UsageError, match="RPC0"):
        make_budgets(machine(), rpc_servers=servers)


def test_unknown_device_and_unknown_memory_are_errors_with_a_hint() -> None:
    with pytest.raises(UsageError, match="no device named CUDA3") as raised:
        make_budgets(machine(GIB, CARD), device_memory={"CUDA3": GIB})
    assert "CUDA0" in raised.value.hint
    with pytest.raises(HardwareError, match="RAM"):
        make_budgets(machine(None))
    with pytest.raises(HardwareError, match="memory of"):
        make_budgets(machine(GIB, Gpu(kind="cuda")))


@given(st.integers(2 * GIB, 512 * GIB), st.none() | st.integers(0, 512 * GIB))
def test_shared_memory_is_given_out_once(ram: int, free: int | None) -> None:
    shared = machine(ram, Gpu(kind="metal", vram_free_bytes=free), unified=True)
    host, gpu = make_budgets(shared)
    assert host.budget_bytes + gpu.budget_bytes <= ram
    assert host.budget_bytes > 0
