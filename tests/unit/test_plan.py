"""Rules of a finished plan: its JSON, what it says when nothing fits, and that what it offers does fit."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.errors import DoesNotFitError
from qnext.pipeline.planning import require_fit
from qnext.pipeline.request import parse_device_memory, parse_overrides
from qnext.plan.choice import choose_placement
from qnext.plan.placement import Problem
from qnext.plan.plan import Plan, explain_misfit, make_plan, plan_to_dict
from qnext.plan.values import HOST, Override, Placement
from qnext.units import GIB, KIB, MIB, parse_size
from tests.planning import DENSE, MIXTURES, SPEEDS, problem

NAMES = st.sampled_from((*MIXTURES, DENSE))
DEVICE_KEYS = {
    "name", "kind", "budget_bytes", "weights_bytes", "kv_bytes", "recurrent_bytes", "compute_bytes",
    "other_bytes", "total_bytes",
}  # fmt: skip
PLACEMENT_KEYS = {
    "n_gpu_layers", "cpu_expert_layers", "overrides", "tensor_split", "context", "batch", "ubatch",
    "kv_type_k", "kv_type_v", "flash_attention", "threads", "threads_batch", "load_mode", "parallel",
}  # fmt: skip


def planned(asked: Problem) -> Plan:
    plan = make_plan("model.gguf", asked, SPEEDS)
    return plan if plan.fits else explain_misfit(plan, asked, lambda changed: True)


@pytest.mark.parametrize("gpus", [{}, {"CUDA0": 20 * MIB}, {"RPC0": 20 * MIB, "RPC1": 9 * MIB}])
def test_json_has_the_keys_other_programs_rely_on(gpus: dict[str, int]) -> None:
    shown = plan_to_dict(planned(problem(gpus=gpus, context=4096)))
    assert {"model", "fits", "devices", "placement", "llama_server_argv", "prediction", "candidates",
            "reasons", "warnings"} <= shown.keys()  # fmt: skip
    assert {"ref", "arch", "quant", "file_bytes", "layers", "experts", "experts_used"} <= shown[
        "model"
    ].keys()
    assert all(device.keys() == DEVICE_KEYS for device in shown["devices"])
    assert {device["kind"] for device in shown["devices"]} <= {"host", "gpu", "rpc"}
    assert shown["placement"].keys() >= PLACEMENT_KEYS
    assert shown["prediction"].keys() == {"decode_tps", "prefill_tps", "source"}
    assert shown["prediction"]["decode_tps"].keys() == {"low", "mid", "high"}
    assert all(reason.keys() == {"what", "because", "numbers"} for reason in shown["reasons"])
    assert all(re.fullmatch(r".+=[\w\[\].:]+", rule) for rule in shown["placement"]["overrides"])
    for device in shown["devices"]:
        parts = DEVICE_KEYS - {"name", "kind", "budget_bytes", "total_bytes"}
        assert device["total_bytes"] == sum(device[part] for part in parts)


@settings(max_examples=25, deadline=None)
@given(NAMES, st.integers(0, 40 * MIB), st.integers(4 * MIB, 60 * MIB))
def test_same_inputs_same_plan(name: str, gpu: int, host: int) -> None:
    assert planned(problem(name, {"CUDA0": gpu}, host=host)) == planned(
        problem(name, {"CUDA0": gpu}, host=host)
    )


def wishes_of(text: str, asked: Problem) -> Problem:
    """The problem with the flags of one alternative applied, as a user would type them."""
    names = {"-c": "context", "-ub": "ubatch", "-np": "parallel", "-ctk": "kv_type_k", "-ctv": "kv_type_v"}
    options = asked.options
    if "no -ngl" in text or "nothing else forced" in text:
        options = replace(options, n_gpu_layers=None, cpu_experts=None, overrides=(), tensor_split=None)
    words = shlex.split(text.split(",")[0])
    for flag, value in zip(words[::2], words[1::2], strict=False):
        if flag == "--load-mode":
            options = replace(options, load_mode=value)  # type: ignore[arg-type]
        elif flag in names:
            options = replace(options, **{names[flag]: int(value) if value.isdigit() else value})  # type: ignore[arg-type]
    return replace(asked, options=options)


@settings(max_examples=25, deadline=None)
@given(
    NAMES,
    st.integers(0, 30 * MIB),
    st.integers(6 * MIB, 40 * MIB),
    st.sampled_from([1, 4]),
    st.sampled_from(["none", "mmap"]),
)
def test_every_change_offered_does_fit(name: str, gpu: int, host: int, slots: int, mode: str) -> None:
    asked = problem(
        name, {"CUDA0": gpu}, host=host, context=16_384, ubatch=512, parallel=slots, load_mode=mode
    )
    plan = planned(asked)
    if plan.fits:
        assert plan.alternatives == ()
        return
    *flags, file = plan.alternatives
    for text in flags:
        changed = wishes_of(text, asked)
        assert changed != asked
        assert choose_placement(changed).fits, text
    size = re.search(r"up to ([\d.]+ \w+)", file)
    assert size is None or parse_size(size[1]) < asked.header.file_bytes


def test_what_was_forced_is_offered_to_be_left_out() -> None:
    plan = planned(problem(gpus={"CUDA0": 10 * MIB}, n_gpu_layers=999, cpu_experts=0, context=4096))
    assert set(plan.missing) == {"CUDA0"}
    assert "no -ngl, -ncmoe, -ot or -ts" in plan.alternatives


def test_free_changes_come_before_those_that_cost() -> None:
    fits = problem(context=32_768, ubatch=512, kv_type_k="f16")
    total = planned(fits).devices[0].total_bytes
    plan = planned(replace(problem(context=32_768, ubatch=512, kv_type_k="f16", host=total - KIB)))
    assert plan.alternatives[0] == "-ub 128"
    assert plan.alternatives[1] == "-ctk q8_0 -ctv q8_0"
    assert re.fullmatch(r"-c \d+", plan.alternatives[2])
    assert int(plan.alternatives[2].split()[1]) >= 30_000


def test_weights_larger_than_all_memory_leave_only_a_smaller_file() -> None:
    plan = planned(problem(gpus={"CUDA0": MIB}, host=3 * MIB))
    assert len(plan.alternatives) == 1
    assert "a file of up to" in plan.alternatives[0] or "another model" in plan.alternatives[0]


def test_misfit_is_an_error_with_the_bytes_that_lack_and_what_to_do() -> None:
    plan = planned(problem(host=12 * MIB))
    with pytest.raises(DoesNotFitError) as raised:
        require_fit(plan)
    assert raised.value.exit_code == 4
    assert " MiB on CPU missing" in raised.value.message
    assert raised.value.hint.startswith("This would fit: ")
    require_fit(planned(problem()))


def test_given_placement_is_described_and_not_searched() -> None:
    asked = problem(gpus={"CUDA0": GIB})
    placement = Placement(devices=("CUDA0",), n_gpu_layers=2, context=1024)
    assert make_plan("m", asked, SPEEDS, placement=placement).placement == placement


@pytest.mark.parametrize(
    ("asked", "what", "number"),
    [
        (problem(gpus={"CUDA0": 20 * MIB}, context=4096, ubatch=256), "experts of", "next_layer_bytes"),
        (problem(gpus={"CUDA0": GIB}), "all experts on the GPU", "CUDA0_left_bytes"),
        (problem(gpus={"CUDA0": 11 * MIB}, context=4096, ubatch=256), "layers without them", "layers_on_gpu"),
        (problem(DENSE, {"CUDA0": 10 * MIB}, context=4096, ubatch=256), "of 6 layers", "layers_on_gpu"),
        (problem(DENSE, {"CUDA0": GIB}), "all layers on the GPU", "layers_on_gpu"),
        (problem(), "everything on the CPU", "host_bytes"),
        (problem(gpus={"CUDA0": GIB}, n_gpu_layers=0), "everything on the CPU", "host_bytes"),
    ],
)
def test_first_reason_says_where_things_are_with_numbers(asked: Problem, what: str, number: str) -> None:
    reason = planned(asked).reasons[0]
    assert what in reason.what
    assert number in reason.numbers


def test_context_beyond_training_is_warned_about() -> None:
    assert any("trained" in text for text in planned(problem(context=65_536)).warnings)
    assert not planned(problem(context=32_768)).warnings


def test_overrides_are_read_as_llama_cpp_reads_them() -> None:
    assert parse_overrides(("a=CPU,b=RPC0[1.2.3.4:5]", "c=CUDA0")) == (
        Override("a", HOST),
        Override("b", "RPC0[1.2.3.4:5]"),
        Override("c", "CUDA0"),
    )
    assert parse_device_memory(("RPC0=8G",)) == {"RPC0": 8 * GIB}
