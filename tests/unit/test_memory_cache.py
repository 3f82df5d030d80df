"""The attention cache, the recurrent state and the output buffer are as large as llama.cpp makes them.

The figures in MiB are lines of llama.cpp 0.5.0's log (llama-cpp-python 0.3.36): "size = … MiB" of dry runs
over the published models' true shapes, and "… buffer size" of real loads of the tiny ones.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnext.errors import UsageError
from qnext.models.gguf_reader import read_header
from qnext.models.shape import ModelShape, read_shape
from qnext.models.synth.synthesise import synthesise
from qnext.plan.cache import context_sizes, kv_bytes, output_bytes, recurrent_bytes
from qnext.plan.traits import DeviceTraits, host_traits
from qnext.plan.values import HOST, Placement
from qnext.plan.weights import layer_devices
from qnext.units import MIB

RPC = DeviceTraits("RPC0", "rpc", "RPC0[127.0.0.1:50052]")
TRAITS = {HOST: host_traits(), "RPC0": RPC}
PUBLISHED = ("qwen3-next-80b-a3b", "gpt-oss-20b", "qwen3-30b-a3b")
SMALL = ("tiny-qwen3next", "tiny-qwen3next-mtp", "tiny-gpt-oss", "tiny-qwen3")

Shapes = dict[str, ModelShape]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Shapes:
    folder = tmp_path_factory.mktemp("shapes")
    made = {}
    for name in PUBLISHED + SMALL:
        synthesise(name, folder / f"{name}.gguf", quant="Q4_K_M", header_only=True)
        made[name] = read_shape(read_header(folder / f"{name}.gguf"))
    return made


def cache(shape: ModelShape, placement: Placement) -> dict[str, int]:
    devices = [RPC] if placement.devices else []
    return kv_bytes(shape, placement, layer_devices(shape, placement, devices), TRAITS)


def state(shape: ModelShape, placement: Placement) -> dict[str, int]:
    devices = [RPC] if placement.devices else []
    return recurrent_bytes(shape, placement, layer_devices(shape, placement, devices), TRAITS)


@pytest.mark.parametrize(
    ("name", "context", "slots", "cache_type", "ubatch", "logged_mib"),
    [
        ("qwen3-next-80b-a3b", 32768, 1, "f16", 512, 768.00),
        ("qwen3-next-80b-a3b", 32768, 4, "q8_0", 2048, 408.00),
        ("qwen3-next-80b-a3b", 262144, 1, "f16", 2048, 6144.00),
        ("gpt-oss-20b", 32768, 1, "f16", 512, 768.00 + 18.00),
        ("gpt-oss-20b", 32768, 4, "q8_0", 2048, 408.00 + 114.75),
        ("gpt-oss-20b", 262144, 1, "f16", 2048, 6144.00 + 54.00),
        ("qwen3-30b-a3b", 32768, 1, "f16", 512, 3072.00),
    ],
)
def test_the_cache_is_what_the_engine_logs(
    shapes: Shapes, name: str, context: int, slots: int, cache_type: str, ubatch: int, logged_mib: float
) -> None:
    placement = Placement(
        context=context, parallel=slots, kv_type_k=cache_type, kv_type_v=cache_type, ubatch=ubatch
    )
    assert cache(shapes[name], placement) == {HOST: logged_mib * MIB}


def test_the_state_does_not_depend_on_the_context_but_on_the_slots(shapes: Shapes) -> None:
    shape = shapes["qwen3-next-80b-a3b"]
    one = state(shape, Placement(context=32768))
    assert one == state(shape, Placement(context=262144)) == {HOST: 75.375 * MIB}  # logged as 75.38
    assert state(shape, Placement(parallel=4)) == {HOST: 301.5 * MIB}
    assert state(shapes["gpt-oss-20b"], Placement()) == {}


def test_rollback_copies_the_state_only_where_the_engine_can(shapes: Shapes) -> None:
    shape = shapes["tiny-qwen3next"]
    once, thrice = Placement(), Placement(recurrent_rollback=2)
    assert state(shape, thrice) == state(shape, once)
    newer = replace(shape, arch="qwen35moe")
    assert state(newer, thrice)[HOST] == 3 * state(newer, once)[HOST]


@pytest.mark.parametrize(
    ("name", "kv_mib", "state_mib"),
    [
        ("tiny-qwen3next", {HOST: 1.33, "RPC0": 1.33}, {HOST: 0.82, "RPC0": 0.82}),
        ("tiny-qwen3next-mtp", {HOST: 1.33, "RPC0": 1.33}, {HOST: 1.09, "RPC0": 0.55}),
        ("tiny-gpt-oss", {HOST: 1.86, "RPC0": 3.72}, {}),
        ("tiny-qwen3", {HOST: 2.66, "RPC0": 5.31}, {}),
    ],
)
def test_layers_keep_their_cache_and_state_where_they_are(
    shapes: Shapes, name: str, kv_mib: dict[str, float], state_mib: dict[str, float]
) -> None:
    placement = Placement(
        context=5000, batch=512, ubatch=256, parallel=4, kv_type_k="q8_0", kv_type_v="q8_0",
        devices=("RPC0",), n_gpu_layers=5,
    )  # fmt: skip
    found = {device: size / MIB for device, size in cache(shapes[name], placement).items()}
    assert found == pytest.approx(kv_mib, abs=0.0101)  # two lines, two decimals each
    found = {device: size / MIB for device, size in state(shapes[name], placement).items()}
    assert found == pytest.approx(state_mib, abs=0.0051)
    at_home = replace(placement, kv_offload=False)
    assert set(cache(shapes[name], at_home)) == {HOST}
    assert set(state(shapes[name], at_home)) <= {HOST}


def test_a_sliding_cache_holds_the_window_and_one_ubatch(shapes: Shapes) -> None:
    shape = shapes["gpt-oss-20b"]
    per_cell = 12 * 2 * 8 * 64 * 2  # 12 layers, K and V, 8 heads of 64, f16
    full = cache(shape, Placement(context=65536, swa_full=True))[HOST]
    assert full == 2 * 65536 * per_cell
    assert cache(shape, Placement(context=65536))[HOST] == (65536 + 768) * per_cell
    together = Placement(context=65536, parallel=4, kv_unified=True)
    assert cache(shape, together)[HOST] == (65536 + 1024) * per_cell
    assert cache(shape, Placement(context=512))[HOST] == 2 * 512 * per_cell


def test_contexts_are_padded_to_256_per_slot(shapes: Shapes) -> None:
    shape = shapes["tiny-qwen3"]
    apart = context_sizes(shape, Placement(context=5000, parallel=3))
    assert (apart.context, apart.context_per_sequence, apart.streams) == (5376, 1792, 3)
    together = context_sizes(shape, Placement(context=5000, parallel=3, kv_unified=True))
    assert (together.context, together.context_per_sequence, together.streams) == (5120, 5120, 1)
    trained = context_sizes(shape, Placement(context=0))
    assert trained.context == shape.context_train
    short = context_sizes(shape, Placement(context=100, batch=2048, ubatch=512))
    assert (short.context, short.batch, short.ubatch, short.outputs) == (256, 100, 100, 100)


def test_logits_of_one_token_per_slot_wait_on_the_host(shapes: Shapes) -> None:
    assert output_bytes(shapes["qwen3-next-80b-a3b"], Placement(parallel=4)) == 4 * 151936 * 4


def test_a_cache_type_that_cannot_be_used_is_refused(shapes: Shapes) -> None:
    shape = shapes["tiny-qwen3next"]
    with pytest.raises(UsageError, match="q3_K"):
        cache(shape, Placement(kv_type_k="q3_K"))
    with pytest.raises(UsageError, match="flash attention"):
        cache(shape, Placement(kv_type_v="q8_0", flash_attention="off"))
    with pytest.raises(UsageError, match="heads of 48"):
        cache(replace(shape, key_length=48), Placement(kv_type_k="q8_0"))


@given(contexts=st.tuples(st.integers(256, 1 << 20), st.integers(256, 1 << 20)), slots=st.integers(1, 8))
def test_a_longer_context_never_takes_less(shapes: Shapes, contexts: tuple[int, int], slots: int) -> None:
    short, long = sorted(contexts)
    for name in SMALL:
        sizes = [
            sum(cache(shapes[name], Placement(context=c, parallel=slots)).values()) for c in (short, long)
        ]
        assert sizes[0] <= sizes[1]
