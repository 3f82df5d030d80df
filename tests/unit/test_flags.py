"""The llama-server line and the engine parameters are two views of one placement."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.config import KV_TYPES
from qnext.engine.llama.params import FLASH_ATTENTION, LOAD_MODES
from qnext.plan.expert_rules import expert_pattern
from qnext.plan.flags import llama_server_argv, server_warnings
from qnext.plan.host_caches import HostCaches, plan_host_caches
from qnext.plan.values import CPU_REPACK, HOST, DeviceMemory, Override, Placement
from qnext.units import GIB, MIB
from tests.planning import model

SHAPE = model("tiny-qwen3next")[1]
NO_CACHES = HostCaches(0, 0, 0)
SWITCHES = {
    "--repack": ("extra_buffers", True),
    "--no-repack": ("extra_buffers", False),
    "--kv-unified": ("kv_unified", True),
    "--no-kv-unified": ("kv_unified", False),
    "--no-kv-offload": ("kv_offload", False),
    "--no-op-offload": ("op_offload", False),
    "--swa-full": ("swa_full", True),
}
NUMBERS = {
    "-ngl": "n_gpu_layers",
    "-c": "context",
    "-b": "batch",
    "-ub": "ubatch",
    "-t": "threads",
    "-tb": "threads_batch",
    "-np": "parallel",
}
WORDS = {"-ctk": "kv_type_k", "-ctv": "kv_type_v", "-fa": "flash_attention", "--load-mode": "load_mode"}
NOT_A_FLAG = {"outputs_max", "load_mtp", "recurrent_rollback"}
"""llama-server sets these by itself: as many outputs as slots, no MTP and no rollback unless it drafts."""


def read_argv(argv: tuple[str, ...]) -> Placement:
    """A placement from a command line, as llama.cpp's common/arg.cpp would read it."""
    words: Iterator[str] = iter(argv[1:])
    values: dict[str, object] = {}
    overrides: list[Override] = []
    for word in words:
        if word in SWITCHES:
            name, on = SWITCHES[word]
            values[name] = on
            continue
        if word == "--cpu-moe":
            overrides.append(Override(r"\.ffn_(up|down|gate|gate_up)_(ch|)exps", HOST))
            continue
        value = next(words)
        if word in NUMBERS:
            values[NUMBERS[word]] = int(value)
        elif word in WORDS:
            values[WORDS[word]] = value
        elif word == "--device":
            values["devices"] = () if value == "none" else tuple(value.split(","))
        elif word == "--rpc":
            values["rpc_servers"] = tuple(value.split(","))
        elif word == "-ts":
            values["tensor_split"] = tuple(float(share) for share in value.split(","))
        elif word == "--n-cpu-moe":
            for layer in range(int(value)):
                overrides.append(Override(rf"blk\.{layer}\.ffn_(up|down|gate|gate_up)_(ch|)exps", HOST))
        elif word == "-ot":
            overrides += [Override(*rule.split("=", 1)) for rule in value.split(",")]
        else:
            assert word in ("-m", "--fit", "--ctx-checkpoints", "--cache-ram"), word
    return Placement(overrides=tuple(overrides), **values)  # type: ignore[arg-type]


def same_effect(one: tuple[Override, ...], other: tuple[Override, ...]) -> bool:
    """Whether two lists of rules send every tensor to the same buffer."""

    def chosen(rules: tuple[Override, ...], name: str) -> str | None:
        return next((rule.buffer for rule in rules if re.search(rule.pattern, name)), None)

    names = [tensor.name for tensor in model("tiny-qwen3next")[0].tensors]
    names += ["blk.3.ffn_gate_up_exps.weight", "blk.1.ffn_down_chexps.weight"]
    return all(chosen(one, name) == chosen(other, name) for name in names)


def with_experts(layers: tuple[int, ...], first: tuple[Override, ...]) -> dict[str, object]:
    rules = (*first, Override(expert_pattern(layers), HOST)) if layers else first
    return {"cpu_expert_layers": layers, "overrides": rules}


EXPERTS = st.builds(
    with_experts,
    st.one_of(
        st.integers(0, 8).map(lambda count: tuple(range(count))),
        st.integers(0, 8).map(lambda count: tuple(range(8 - count, 8))),
    ),
    st.sampled_from([(), (Override(r"output\.weight", "RPC0[127.0.0.1:50052]"),)]),
)
PLACEMENTS = st.builds(
    lambda experts, **values: Placement(**experts, **values),  # type: ignore[arg-type]
    EXPERTS,
    devices=st.sampled_from([("CUDA0",), ("CUDA0", "RPC0")]),
    rpc_servers=st.sampled_from([("127.0.0.1:50052",), ("127.0.0.1:50052", "10.0.0.2:1")]),
    n_gpu_layers=st.integers(0, 999),
    tensor_split=st.none() | st.tuples(st.floats(0, 1e6, width=32), st.floats(0, 1e6, width=32)),
    context=st.integers(1, 1 << 20),
    batch=st.integers(1, 8192),
    ubatch=st.integers(1, 8192),
    kv_type_k=st.sampled_from(KV_TYPES),
    kv_type_v=st.sampled_from(KV_TYPES),
    flash_attention=st.sampled_from(sorted(FLASH_ATTENTION)),
    threads=st.integers(1, 256),
    threads_batch=st.integers(1, 256),
    load_mode=st.sampled_from(sorted(LOAD_MODES)),
    parallel=st.integers(1, 64),
    extra_buffers=st.booleans(),
    kv_unified=st.booleans(),
    kv_offload=st.booleans(),
    op_offload=st.booleans(),
    swa_full=st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(PLACEMENTS)
def test_command_line_says_every_field_of_the_placement(placement: Placement) -> None:
    read = read_argv(llama_server_argv(placement, "model.gguf", SHAPE, NO_CACHES))
    for field in fields(Placement):
        if field.name in ("overrides", "cpu_expert_layers", "tensor_split", *NOT_A_FLAG):
            continue
        assert getattr(read, field.name) == getattr(placement, field.name), field.name
    assert same_effect(read.overrides, placement.overrides)
    split = placement.tensor_split
    assert read.tensor_split == (None if split is None else pytest.approx(split, rel=1e-7))


def test_every_field_is_either_a_flag_or_known_not_to_be() -> None:
    said = {name for name, _ in SWITCHES.values()} | set(NUMBERS.values()) | set(WORDS.values())
    said |= {"devices", "rpc_servers", "tensor_split", "overrides", "cpu_expert_layers"}
    assert said | NOT_A_FLAG == {field.name for field in fields(Placement)}


@pytest.mark.parametrize(
    ("layers", "flags"),
    [
        ((), ()),
        ((0, 1, 2), ("--n-cpu-moe", "3")),
        (tuple(range(8)), ("--cpu-moe",)),
        ((6, 7), ("-ot", r"blk\.(6|7)\.ffn_(up|down|gate_up|gate)_(ch|)exps=CPU")),
    ],
)
def test_n_cpu_moe_is_written_only_where_it_says_the_same(
    layers: tuple[int, ...], flags: tuple[str, ...]
) -> None:
    placement = Placement(devices=("CUDA0",), n_gpu_layers=999, **with_experts(layers, ()))  # type: ignore[arg-type]
    argv = llama_server_argv(placement, "m.gguf", SHAPE, NO_CACHES)
    assert argv[argv.index("-ngl") + 2 : argv.index("-c")] == flags


def test_rpc_workers_are_named_before_their_devices_and_buffers() -> None:
    rule = Override("output", "RPC0[127.0.0.1:50052]")
    placement = Placement(devices=("RPC0",), rpc_servers=("127.0.0.1:50052",), overrides=(rule,))
    argv = llama_server_argv(placement, "m.gguf", SHAPE, NO_CACHES)
    assert argv.index("--rpc") < argv.index("--device") < argv.index("-ot")


def test_buffers_the_command_line_cannot_name_are_left_out_and_said() -> None:
    rule = Override("ffn_up_exps", CPU_REPACK)
    alone = Placement(overrides=(rule,))
    assert "-ot" not in llama_server_argv(alone, "m.gguf", SHAPE, NO_CACHES)
    assert "CPU_REPACK" in server_warnings(alone)[0]
    beside = replace(alone, devices=("CUDA0",))
    argv = llama_server_argv(beside, "m.gguf", SHAPE, NO_CACHES)
    assert argv[argv.index("-ot") + 1] == "ffn_up_exps=CPU"
    assert not server_warnings(Placement())


def test_pinned_memory_becomes_plain_memory_on_the_line_and_is_said() -> None:
    pinned = Placement(devices=("CUDA0",), overrides=(Override("ffn_up_exps", "CUDA_Host"),))
    argv = llama_server_argv(pinned, "m.gguf", SHAPE, NO_CACHES)
    assert argv[argv.index("-ot") + 1] == "ffn_up_exps=CPU"
    assert any("CUDA_Host" in warning for warning in server_warnings(pinned))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40 * GIB), st.integers(0, 100 * MIB), st.integers(1, 8))
def test_caches_of_the_server_stay_in_what_the_plan_leaves(spare: int, snapshot: int, slots: int) -> None:
    host = DeviceMemory("CPU", "host", GIB + spare, GIB - snapshot * slots, 0, snapshot * slots, 0)
    caches = plan_host_caches([host], slots, snapshot)
    argv = llama_server_argv(Placement(parallel=slots), "m.gguf", SHAPE, caches)
    checkpoints = int(argv[argv.index("--ctx-checkpoints") + 1])
    cache = int(argv[argv.index("--cache-ram") + 1])
    assert 0 <= checkpoints <= 32
    assert 0 <= cache <= 8192
    assert checkpoints * snapshot * slots + cache * MIB <= spare
