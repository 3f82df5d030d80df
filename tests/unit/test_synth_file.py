"""Writing true-shape files: whole or not at all, sparse if only the header is wanted, one file per seed."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qnext.errors import EngineError, ModelError
from qnext.models.gguf_reader import read_header
from qnext.models.synth import SHAPES, synthesise
from qnext.models.synth.shapes import tensor_shapes
from qnext.models.synth.tokenizer import QWEN_SPECIAL, spell, syllable_vocabulary
from qnext.units import GIB, MIB


def test_a_header_only_file_has_the_true_size_and_next_to_nothing_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    report = synthesise("qwen3-next-80b-a3b", path, quant="Q4_K_M", header_only=True)
    stat = path.stat()
    assert stat.st_size == report.file_bytes > 45 * GIB
    assert stat.st_blocks * 512 < 10 * MIB
    header = read_header(path)
    assert len(header.tensors) == 843
    assert header.metadata["qwen3next.expert_count"] == 512
    assert header.metadata["tokenizer.ggml.eos_token_id"] == 151645


@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("tiny")])
def test_the_reader_finds_every_tensor_where_it_was_written(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    report = synthesise(name, path, quant="MXFP4_MOE" if "oss" in name else "Q8_0", header_only=True)
    header = read_header(path)
    assert [(t.name, t.shape) for t in header.tensors] == list(tensor_shapes(SHAPES[name]))
    assert header.file_bytes == report.file_bytes


def test_one_seed_gives_one_file_and_experts_differ(tmp_path: Path) -> None:
    digests = []
    for index, seed in enumerate((1, 1, 2)):
        path = tmp_path / f"{index}.gguf"
        synthesise("tiny-qwen3moe", path, quant="Q8_0", layers=1, seed=seed)
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    assert digests[0] == digests[1] != digests[2]
    header = read_header(tmp_path / "0.gguf")
    downs = header.tensors[-1]
    assert downs.name == "blk.0.ffn_down_exps.weight"
    data = (tmp_path / "0.gguf").read_bytes()[-downs.nbytes :]
    size = downs.nbytes // 16
    assert len({data[start : start + size] for start in range(0, downs.nbytes, size)}) == 16


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    synthesise(
        "tiny-qwen3", tmp_path / "m.gguf", quant="BF16", layers=1, progress=lambda *at: seen.append(at)
    )
    assert seen[-1][0] == seen[-1][1]
    assert seen == sorted(seen)


def test_quantising_without_the_engine_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as caught:
        synthesise("tiny-qwen3", tmp_path / "m.gguf", quant="Q4_K_M")
    assert "header-only" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "precious.gguf"
    path.write_text("precious")
    with pytest.raises(ModelError, match="exists"):
        synthesise("tiny-qwen3", path, quant="Q8_0")
    assert path.read_text() == "precious"


def test_too_little_room_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 * MIB))
    with pytest.raises(ModelError, match="free") as caught:
        synthesise("tiny-qwen3", tmp_path / "m.gguf", quant="Q8_0")
    assert "--layers" in caught.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are a POSIX matter")
def test_a_disk_that_fills_up_leaves_no_file_behind(tmp_path: Path) -> None:
    script = (
        "import resource, sys; from pathlib import Path; from qnext.errors import ModelError;"
        "from qnext.models.synth import synthesise;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try: synthesise('tiny-qwen3', Path(sys.argv[1]), quant='F32')\n"
        "except ModelError as error: print(error.message, '|', error.hint)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "m.gguf")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert "cannot write" in result.stdout
    assert not list(tmp_path.iterdir())


def test_a_large_vocabulary_has_distinct_tokens_all_bytes_and_special_ids() -> None:
    vocabulary = syllable_vocabulary(151936, QWEN_SPECIAL, 151643)
    assert len(set(vocabulary.tokens)) == len(vocabulary.tokens) == len(vocabulary.types) == 151936
    assert vocabulary.tokens[151645] == "<|im_end|>"
    assert len(vocabulary.merges) == 151643 - 256
    assert all(spell(chr(code)) in vocabulary.tokens[:256] for code in range(128))
    known = set(vocabulary.tokens)
    assert all({*merge.split(" "), merge.replace(" ", "")} <= known for merge in vocabulary.merges)
