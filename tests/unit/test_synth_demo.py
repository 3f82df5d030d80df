"""The demo: the same bytes each time, a vocabulary that spells its sentence, and a written-whole file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from qnext.errors import ModelError
from qnext.models.synth import DEMO_SENTENCE, demo_path, make_demo
from qnext.models.synth.blocks import quantise_q8_0, random_q4_k
from qnext.models.synth.demo import _VERSION, DEMO_WORDS
from qnext.models.synth.tokenizer import spell, train_vocabulary
from qnext.units import MIB

DEMO_SHA256 = "ce87300067f404629aceb75eb06ab9f8bc7987535450b1917b8cee49958318ba"
"""Changes only together with `_VERSION`, or old demos in users' caches would stay."""


def test_the_demo_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    make_demo(tmp_path / "demo.gguf")
    data = (tmp_path / "demo.gguf").read_bytes()
    assert len(data) < 12 * MIB
    assert (_VERSION, hashlib.sha256(data).hexdigest()) == (1, DEMO_SHA256)


def test_the_demo_is_made_once_and_nothing_else_is_left_in_the_cache(tmp_path: Path) -> None:
    path = demo_path(tmp_path / "cache")
    made = path.stat().st_mtime_ns
    assert demo_path(tmp_path / "cache") == path
    assert path.stat().st_mtime_ns == made
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_cache_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(ModelError) as caught:
        demo_path(tmp_path / "cache")
    assert caught.value.hint


def test_every_word_of_the_sentence_has_one_successor() -> None:
    assert len(set(DEMO_WORDS)) == len(DEMO_WORDS)
    assert 25 <= len(DEMO_WORDS) <= 40
    assert "".join(DEMO_WORDS) == DEMO_SENTENCE


def test_training_ends_with_every_word_one_token_reached_by_merges() -> None:
    vocabulary = train_vocabulary([" lower", " lowest", "é"], {"<|end|>": 3}, multiple=64)
    for word in (" lower", " lowest", "é"):
        assert spell(word) in vocabulary.tokens
    pieces = {*vocabulary.tokens}
    assert all({*merge.split(" "), merge.replace(" ", "")} <= pieces for merge in vocabulary.merges)
    assert len(vocabulary.tokens) == len(pieces) == len(vocabulary.types)
    assert len(vocabulary.tokens) % 64 == 0


def test_q8_0_and_q4_k_bytes_decode_to_the_intended_values() -> None:
    import gguf
    import numpy as np

    rng = np.random.default_rng(0)
    values = rng.standard_normal((4, 256)).astype("f4")
    values[0, :32] = 0
    back = gguf.quants.dequantize(
        np.frombuffer(quantise_q8_0(values), "u1").reshape(4, -1), gguf.GGMLQuantizationType.Q8_0
    )
    assert np.abs(back - values).max() <= np.abs(values).max() / 127
    blocks = np.frombuffer(random_q4_k(rng, 64, -11), "u1").reshape(64, 144)
    decoded = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_K)
    assert abs(decoded.mean()) < 0.002
    assert decoded.std() == pytest.approx(147.5 * 2**-11, rel=0.02)
