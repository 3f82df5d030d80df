"""Whatever bytes come, the header reader answers with a header that holds or with one ModelError.

`scripts/fuzz_headers.py` tries 20,000 cases with limits on memory and time; these are the few hundred that
run every time, and the round trip of headers made up by hypothesis.
"""

from __future__ import annotations

import importlib.util
import math
import random
import tracemalloc
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.errors import ModelError
from qnext.models.gguf_parse import ShardHeader, read_shard
from qnext.models.header import SkippedArray
from tests.gguf_writing import (
    ARR,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    STR,
    U8,
    U16,
    U32,
    U64,
    MemorySource,
    Tensor,
    Value,
    array,
    build,
    sample_metadata,
    sample_tensors,
)

FIXED = 1 << 20
"""Bytes that reading may take beyond the size of the file."""

INTEGERS = {
    U8: (0, 8),
    I8: (1, 8),
    U16: (0, 16),
    I16: (1, 16),
    U32: (0, 32),
    I32: (1, 32),
    U64: (0, 64),
    I64: (1, 64),
}


def integers(kind: int) -> st.SearchStrategy[int]:
    signed, bits = INTEGERS[kind]
    return st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else st.integers(0, 2**bits - 1)


NUMBERS: dict[int, st.SearchStrategy[object]] = {
    **{kind: integers(kind) for kind in INTEGERS},
    F32: st.floats(width=32, allow_nan=False),
    F64: st.floats(allow_nan=False),
    BOOL: st.booleans(),
}
TEXT = st.text(max_size=80)
SCALARS = st.one_of(
    *(st.builds(Value, st.just(kind), values) for kind, values in NUMBERS.items()),
    st.builds(Value, st.just(STR), TEXT),
)
ARRAYS = st.one_of(
    *(
        st.builds(array, st.just(kind), st.lists(values, max_size=40))
        for kind, values in {**NUMBERS, STR: TEXT}.items()
    )
)
RESERVED = {"general.alignment", "general.architecture", "split.no", "split.count", "split.tensors.count"}
KEYS = st.text(min_size=1, max_size=40).filter(lambda key: key not in RESERVED)
NAMES = st.text(max_size=60).filter(lambda name: len(name.encode()) < 64)
ROWS = {0: 1, 8: 32, 12: 256}


@st.composite
def tensors(draw: st.DrawFn) -> list[Tensor]:
    table = []
    for name in draw(st.lists(NAMES, unique=True, max_size=8)):
        kind = draw(st.sampled_from(sorted(ROWS)))
        shape = [ROWS[kind] * draw(st.integers(1, 3)), *draw(st.lists(st.integers(1, 4), max_size=3))]
        table.append(Tensor(name, tuple(shape), kind))
    return table


def traced_read(data: bytes) -> tuple[ShardHeader | None, int]:
    """The header or None when refused, and the most bytes taken on the way."""
    source = MemorySource(data)
    tracemalloc.start()
    try:
        return read_shard(source), tracemalloc.get_traced_memory()[1]
    except ModelError as error:
        assert error.hint
        assert error.message.startswith("memory, byte ")
        return None, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def check(data: bytes) -> None:
    """The rule for any bytes at all."""
    header, peak = traced_read(data)
    assert peak <= len(data) + FIXED
    if header is None:
        return
    end = 0
    for tensor in header.tensors:
        assert tensor.offset >= end
        assert tensor.offset % header.alignment == 0
        assert tensor.nbytes > 0
        assert math.prod(tensor.shape) > 0
        end = tensor.offset + tensor.nbytes
    assert end <= len(data)


@settings(max_examples=100, deadline=None)
@given(
    metadata=st.dictionaries(KEYS, SCALARS | ARRAYS, max_size=8),
    table=tensors(),
    version=st.sampled_from([2, 3]),
)
def test_any_header_comes_back_as_written(
    metadata: dict[str, Value], table: list[Tensor], version: int
) -> None:
    built = build(metadata, table, version=version)
    header = read_shard(MemorySource(bytes(built.data)))
    for key, value in metadata.items():
        read = header.metadata[key]
        if value.kind != ARR:
            assert read == value.value
        elif value.element == STR:
            assert read == SkippedArray("str", len(value.value))  # type: ignore[arg-type]
        else:
            assert list(read) == value.value  # type: ignore[call-overload]
    assert len(header.metadata) == len(metadata)
    assert [(t.name, t.shape, t.nbytes) for t in header.tensors] == [
        (t.name, t.shape, t.nbytes) for t in table
    ]
    assert header.data_end == len(built.data)


@settings(max_examples=200, deadline=None)
@given(
    start=st.sampled_from([b"", b"GGUF", b"GGUF\x03\0\0\0", b"GGUF\x02\0\0\0" + b"\x01" + bytes(15)]),
    rest=st.binary(),
)
def test_arbitrary_bytes_are_read_or_refused(start: bytes, rest: bytes) -> None:
    check(start + rest)


SAMPLE = bytes(build(sample_metadata(), sample_tensors()).data)
SAMPLE_HEADER = build(sample_metadata(), sample_tensors(), with_data=False).header_bytes


@settings(max_examples=200, deadline=None)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, SAMPLE_HEADER - 1), st.binary(min_size=1, max_size=9)), max_size=4
    ),
    cut=st.none() | st.integers(0, len(SAMPLE)),
)
def test_a_changed_or_cut_file_is_read_or_refused(changes: list[tuple[int, bytes]], cut: int | None) -> None:
    data = bytearray(SAMPLE)
    for at, raw in changes:
        data[at : at + len(raw)] = raw
    check(bytes(data[:cut]))


def load_fuzzer() -> ModuleType:
    """`scripts/fuzz_headers.py` as a module."""
    spec = importlib.util.spec_from_file_location(
        "fuzz_headers", Path(__file__).parents[2] / "scripts" / "fuzz_headers.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fuzzer() -> ModuleType:
    return load_fuzzer()


def test_the_fuzzer_finds_nothing_in_its_first_cases(fuzzer: ModuleType) -> None:
    result = fuzzer.run(count=300, seed=1)
    assert result["crashes"] == 0
    assert result["tried"] == 300 == result["accepted"] + result["rejected"]
    assert result["rejected"] > 100


def test_each_mutation_of_the_fuzzer_changes_the_file(fuzzer: ModuleType) -> None:
    base = build(sample_metadata(), sample_tensors())
    for mutate in fuzzer.MUTATIONS:
        generator = random.Random(7)
        assert any(mutate(generator, base) != bytes(base.data) for _ in range(20)), mutate.__name__
