"""The header reader says what the file says, and refuses in one clear error what llama.cpp would not load."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from qnext.errors import ModelError
from qnext.models.gguf_parse import read_shard
from qnext.models.gguf_reader import read_array, read_header
from qnext.models.gguf_types import GGML_TYPES, tensor_nbytes
from qnext.models.header import SkippedArray
from tests.gguf_writing import (
    ARR,
    BOOL,
    I32,
    Q4_K,
    STR,
    U8,
    U16,
    U32,
    Built,
    MemorySource,
    Tensor,
    Value,
    array,
    build,
    sample_metadata,
    sample_shards,
    sample_tensors,
    string,
    u32,
    write_shards,
)


def put(folder: Path, data: bytes | Built, name: str = "m.gguf") -> Path:
    path = folder / name
    path.write_bytes(data.data if isinstance(data, Built) else data)
    return path


def refusal(path: Path) -> ModelError:
    """The error of reading `path`, which always names the file and the next step."""
    with pytest.raises(ModelError) as caught:
        read_header(path)
    assert str(path.parent) in caught.value.message
    assert caught.value.hint
    return caught.value


def test_type_table_is_that_of_the_gguf_package_but_for_its_known_differences() -> None:
    import gguf

    ours = {kind.id: (kind.name, kind.block_size, kind.block_bytes) for kind in GGML_TYPES.values()}
    theirs = {int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    # ggml-common.h: block_q8_1 is two halves and 32 bytes; Q2_0 is newer than gguf 0.19
    theirs[9] = ("Q8_1", 32, 36)
    theirs.setdefault(42, ("Q2_0", 64, 18))
    assert ours == theirs


@pytest.mark.parametrize("version", [2, 3])
def test_values_and_tensors_come_back_as_written(tmp_path: Path, version: int) -> None:
    metadata, tensors = sample_metadata(), sample_tensors()
    built = build(metadata, tensors, version=version)
    header = read_header(put(tmp_path, built))

    assert (header.version, header.alignment, header.file_bytes) == (version, 32, len(built.data))
    expected = {key: v.value for key, v in metadata.items() if v.kind != ARR}
    expected["qwen3next.per_layer"] = (3, 4)
    expected["tokenizer.ggml.tokens"] = SkippedArray("str", 300)
    expected["tokenizer.ggml.scores"] = SkippedArray("f32", 2000)
    assert dict(header.metadata) == expected
    assert [(t.name, t.shape, t.nbytes) for t in header.tensors] == [
        (t.name, tuple(t.shape), t.nbytes) for t in tensors
    ]
    assert all(t.offset % 32 == 0 and t.nbytes == tensor_nbytes(t.type_name, t.shape) for t in header.tensors)
    assert header.tensors[-1].offset + header.tensors[-1].nbytes == header.file_bytes


def test_declared_alignment_places_the_data(tmp_path: Path) -> None:
    built = build({"general.alignment": u32(4096)}, sample_tensors(), alignment=4096)
    header = read_header(put(tmp_path, built))
    assert header.alignment == 4096
    assert [t.offset for t in header.tensors[:2]] == [4096, 8192]


@pytest.mark.parametrize(("count", "read"), [(0, True), (1024, True), (1025, False)])
def test_number_arrays_are_read_up_to_1024_elements(tmp_path: Path, count: int, read: bool) -> None:
    built = build({"n": array(U16, [7] * count), "flags": array(BOOL, [True, False])})
    metadata = read_header(put(tmp_path, built)).metadata
    assert metadata["n"] == ((7,) * count if read else SkippedArray("u16", count))
    assert metadata["flags"] == (True, False)


def test_a_skipped_array_can_be_read_by_name(tmp_path: Path) -> None:
    path = put(tmp_path, build(sample_metadata(), sample_tensors(), with_data=False))
    assert read_array(path, "tokenizer.ggml.tokens") == tuple(f"token{n}" for n in range(300))
    assert read_array(path, "tokenizer.ggml.scores") == (0.0,) * 2000
    with pytest.raises(ModelError, match=r"no array 'general\.name'"):
        read_array(path, "general.name")


@pytest.mark.parametrize("lengths", [[0] * 70, [63] * 200, [64] * 200, [5, 300_000, 1] * 40])
def test_string_arrays_are_walked_whatever_their_lengths(tmp_path: Path, lengths: list[int]) -> None:
    built = build({"a": array(STR, [b"\0" * n for n in lengths]), "after": u32(5)})
    metadata = read_header(put(tmp_path, built)).metadata
    assert metadata == {"a": SkippedArray("str", len(lengths)), "after": 5}


def test_a_string_over_one_mib_is_skipped_as_bytes(tmp_path: Path) -> None:
    built = build({"tokenizer.huggingface.json": string("x" * (2 << 20)), "after": u32(5)})
    metadata = read_header(put(tmp_path, built)).metadata
    assert metadata == {"tokenizer.huggingface.json": SkippedArray("u8", 2 << 20), "after": 5}


def test_only_the_header_of_a_sparse_file_is_read(tmp_path: Path) -> None:
    built = build(sample_metadata(), [Tensor("big", (256, 1 << 30), Q4_K)], with_data=False)
    path = put(tmp_path, built)
    assert "missing" in refusal(path).message
    assert read_header(path, check_data=False).tensors[0].nbytes == 144 << 30
    os.truncate(path, (144 << 30) + 65536)
    assert read_header(path).file_bytes == (144 << 30) + 65536


def one(**change: object) -> Built:
    """A file of one tensor with something wrong in it."""
    row = {"name": "t", "shape": (256, 2), "kind": Q4_K, **change}
    return build({}, [Tensor(**row)], with_data=False)  # type: ignore[arg-type]


def patched(at: int, raw: bytes) -> bytes:
    data = bytes(build(sample_metadata(), sample_tensors()).data)
    return data[:at] + raw + data[at + len(raw) :]


BROKEN: dict[str, tuple[bytes | Built, str]] = {
    "empty": (b"", r"byte 0: expected a GGUF file, found an empty file"),
    "magic": (b"GGJT" + bytes(60), r"byte 0: expected the letters GGUF, found 'GGJT'"),
    "page": (b"\n<!DOCTYPE html><html>", "found a web page"),
    "pointer": (b"version https://git-lfs.invalid/spec/v1\noid sha256:0", "found a git-LFS pointer"),
    "weights": (struct.pack("<Q", 90) + b'{"__metadata__":{}}', "found PyTorch or safetensors"),
    "three bytes": (b"GGU", "found 'GGU'"),
    "no version": (b"GGUF\x03\0", r"byte 4: expected 4 bytes for the version"),
    "big-endian": (build({}, big_endian=True), r"byte 4: .* found a big-endian one \(version 3\)"),
    "version 1": (build(version=1), "byte 4: expected GGUF version 2 or 3, found version 1"),
    "version 4": (build(version=4), "found version 4"),
    "tensor count": (patched(8, struct.pack("<Q", 2**40)), r"byte 8: expected 0 to \d+ tensors"),
    "negative count": (patched(8, struct.pack("<q", -1)), "found a count of -1"),
    "key count": (patched(16, struct.pack("<Q", 2**63)), r"byte 16: expected 0 to \d+ keys"),
    "key length": (patched(24, struct.pack("<Q", 2**62)), "byte 24: expected key 0 .* found 4611686018"),
    "empty key": (build({"": u32(1)}), "to have 1 to 65535 bytes, found 0"),
    "key not text": (build({b"\xff\xfe": u32(1)}), "byte 32: expected UTF-8 in key 0, found byte 0xff"),  # type: ignore[dict-item]
    "key twice": (build([("k", u32(1)), ("k", u32(2))]), "byte 41: expected each key once, found 'k' again"),
    "value type": (build({"k": Value(U32, 1)}).data[:33] + struct.pack("<I", 13) * 9, "0 to 12 .* found 13"),
    "text not text": (build({"k": string(b"ok\xc3")}), "byte 47: expected UTF-8 in 'k', found byte 0xc3"),
    "array of arrays": (build({"k": array(ARR, [array(U8, [1])])}), "found an array, which llama.cpp"),
    "array length": (
        build({"k": array(U32, [])}).data[:-8] + struct.pack("<Q", 2**62),
        r"byte 41: expected \d+ bytes for 4611686018427387904 elements of 'k'",
    ),
    "string array length": (
        build({"k": array(STR, ["x"])}).data[:-17] + struct.pack("<QQ", 2**61, 1) + b"x",
        "byte 41: expected .* for 2305843009213693952 elements of 'k'",
    ),
    "string in array": (
        build({"k": array(STR, ["x"])}).data[:-9] + struct.pack("<Q", 2**63) + b"x",
        "byte 49: expected 9223372036854775808 bytes for a string of 'k'",
    ),
    "alignment": (build({"general.alignment": u32(48)}), "to be a power of two, found 48"),
    "alignment 0": (build({"general.alignment": u32(0)}), "to be a power of two, found 0"),
    "alignment type": (build({"general.alignment": Value(I32, 32)}), "to be u32, found i32"),
    "architecture type": (build({"general.architecture": u32(1)}), "to be str, found u32"),
    "tensor name": (one(name="n" * 64), "under 64 bytes, found 64"),
    "tensor twice": (
        build({}, [Tensor("t"), Tensor("t")]),
        "expected each tensor name once, found 't' again",
    ),
    "dimensions": (one(shape=(256, 1, 1, 1, 1)), "at most 4 dimensions of 't', found 5"),
    "zero size": (one(shape=(256, 0)), r"found shape \[256, 0\]"),
    "negative size": (one(shape=(256, -2)), r"found shape \[256, -2\]"),
    "too many elements": (one(shape=(2**32, 2**32)), r"under 2\^63 elements"),
    "tensor type": (one(kind=99), "a tensor type of llama.cpp for 't', found 99"),
    "removed type": (one(kind=31), "found 31"),
    "half a block": (one(shape=(100, 2)), "whole Q4_K blocks of 256, found rows of 100"),
    "misaligned": (one(offset=8), "at data offset 0, found 8, which is not aligned to 32"),
    "gap": (one(offset=64), "at data offset 0, found 64, which leaves a gap"),
    "overlap": (build({}, [Tensor("a"), Tensor("b", offset=0)]), "found 0, which overlaps"),
    "no data": (one(), r"missing"),
    "beyond 2^63": (one(kind=0, shape=(2**61,)), r"to end before byte 2\^63"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_contents_are_one_error_that_says_what_and_where(tmp_path: Path, case: str) -> None:
    data, pattern = BROKEN[case]
    path = put(tmp_path, data)
    error = refusal(path)
    assert error.message.startswith(f"{path}, byte ")
    assert re.search(pattern, error.message), error.message


def test_every_truncation_is_refused() -> None:
    built = build(sample_metadata(), sample_tensors())
    data = bytes(built.data)
    for length in [*range(0, built.header_bytes, 13), built.header_bytes, len(data) - 1]:
        with pytest.raises(ModelError, match="m, byte"):
            read_shard(MemorySource(data[:length], "m"))


def test_an_unfinished_download_says_how_much_is_missing(tmp_path: Path) -> None:
    error = refusal(put(tmp_path, bytes(build(sample_metadata(), sample_tensors()).data)[:-3000]))
    assert "3000 bytes (3 KiB) are missing" in error.message
    assert "resume it" in error.hint


def test_a_vocabulary_that_leads_into_the_weights_is_refused(tmp_path: Path) -> None:
    built = build({"k": array(STR, ["x"])})
    path = put(tmp_path, bytes(built.data[:41]) + struct.pack("<Q", 2**36))
    os.truncate(path, 2**40)
    assert "within the first 128 MiB" in refusal(path).message


def test_masses_of_metadata_are_refused_before_they_fill_memory(tmp_path: Path) -> None:
    built = build({f"k{n}": string(b"x" * (1 << 20)) for n in range(9)})
    assert "at most 32 MiB of metadata" in refusal(put(tmp_path, built)).message


def no_file(folder: Path) -> Path:
    return folder / "none.gguf"


def dangling(folder: Path) -> Path:
    path = folder / "m.gguf"
    path.symlink_to(folder / "gone")
    return path


def pipe(folder: Path) -> Path:
    path = folder / "m.gguf"
    os.mkfifo(path)
    return path


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder, "is a folder"),
        (no_file, "does not exist"),
        (dangling, "is a link to a file that is gone"),
        (pipe, "is not a regular file"),
        (lambda folder: folder / ("n" * 300), "cannot be opened"),
        (lambda folder: folder / "a\0b.gguf", "cannot be opened"),
        (lambda folder: put(folder, b"", "file") / "m.gguf", "cannot be opened: Not a directory"),
    ],
)
def test_what_is_no_file_is_an_error(tmp_path: Path, make: Callable[[Path], Path], says: str) -> None:
    assert says in refusal(make(tmp_path)).message


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_an_error(tmp_path: Path) -> None:
    path = put(tmp_path, build({}))
    path.chmod(0)
    assert "cannot be opened: Permission denied" in refusal(path).message


@pytest.mark.parametrize("given", [0, 1, 2])
def test_any_shard_leads_to_the_whole_set(tmp_path: Path, given: int) -> None:
    shards = sample_shards(3)
    paths = write_shards(tmp_path, shards)
    header = read_header(paths[given])
    assert header.paths == tuple(paths)
    assert header.file_bytes == sum(len(shard.data) for shard in shards)
    assert header.metadata["general.architecture"] == "qwen3next"
    assert [t.shard for t in header.tensors] == [1, 1, 1, 2, 2, 2]
    for tensor in header.tensors:
        assert tensor.offset >= shards[tensor.shard].header_bytes
        assert tensor.offset + tensor.nbytes <= len(shards[tensor.shard].data)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, sample_shards(3))
    paths[1].unlink()
    message = refusal(paths[0]).message
    assert "expected 3 shards" in message
    assert "found no m-00002-of-00003.gguf" in message
    assert "does not exist" in refusal(paths[1]).message


def split(number: int, count: int, tensors: int) -> dict[str, Value]:
    return {
        "general.architecture": string("a"),
        "split.no": Value(U16, number),
        "split.count": Value(U16, count),
        "split.tensors.count": Value(I32, tensors),
    }


def other(change: dict[str, Value], name: str = "t1") -> Built:
    return build({**split(1, 2, 2), **change}, [Tensor(name)])


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (other({"split.no": Value(U16, 0)}), "expected split.no 1 as the name says, found 0"),
        (build({}, [Tensor("t1")]), "expected split.no 1 as the name says, found none"),
        (other({"split.count": Value(U16, 3)}), "expected split.count 2 as the name says, found 3"),
        (other({"split.tensors.count": Value(I32, 3)}), "to be the 2 tensors of all shards, found 3"),
        (other({"general.architecture": string("b")}), "expected general.architecture 'a'"),
        (other({}, name="t0"), "expected each tensor once in the set, found 't0' also in"),
        (build(split(1, 2, 2)), "to be the 1 tensors of all shards, found 2"),
        (b"", "byte 0: expected a GGUF file, found an empty file"),
    ],
)
def test_shards_that_do_not_belong_together_are_refused(
    tmp_path: Path, second: Built | bytes, says: str
) -> None:
    first = put(tmp_path, build(split(0, 2, 2), [Tensor("t0")]), "m-00001-of-00002.gguf")
    put(tmp_path, second, "m-00002-of-00002.gguf")
    assert says in refusal(first).message


def test_a_shard_under_another_name_is_refused(tmp_path: Path) -> None:
    built = build(split(0, 2, 1), [Tensor("t0")])
    assert "found one shard of 2" in refusal(put(tmp_path, built)).message
    with pytest.raises(ModelError, match="names shard 3 of 2, which cannot be"):
        read_header(tmp_path / "m-00003-of-00002.gguf")


@pytest.mark.parametrize("name", ["m.gguf", "m-00001-of-00001.gguf"])
@pytest.mark.parametrize("count", [0, 1])
def test_a_merged_or_single_shard_is_a_whole_model(tmp_path: Path, name: str, count: int) -> None:
    header = read_header(put(tmp_path, build(split(0, count, 1), [Tensor("t0")]), name))
    assert len(header.tensors) == 1
