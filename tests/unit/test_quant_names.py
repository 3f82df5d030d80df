"""Quants are told by the names people publish under; what is no model to run is left out, with the reason."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnext.errors import ModelError
from qnext.models.published import Listing, RepoFile
from qnext.models.quant_names import group_quants, pick_quant

GIB = 1 << 30


def listing(*paths: str | tuple[str, float]) -> Listing:
    """Files of the given GiB (10 where not said), each of its own digest."""
    files = []
    for entry in paths:
        path, gib = entry if isinstance(entry, tuple) else (entry, 10.0)
        files.append(RepoFile(path, int(gib * GIB), f"digest of {path}"))
    return group_quants("user/repo", "abc", files)


@pytest.mark.parametrize(
    ("path", "quant"),
    [
        ("Qwen3-Next-80B-A3B-Instruct-Q4_K_M.gguf", "Q4_K_M"),
        ("Qwen3-Next-80B-A3B-Instruct-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("Qwen3-30B-A3B-IQ4_XS.gguf", "IQ4_XS"),
        ("Qwen3-Next-80B-A3B-Instruct-MXFP4_MOE.gguf", "MXFP4_MOE"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("BF16/Model-BF16.gguf", "BF16"),
        ("UD-Q2_K_XL/model.gguf", "UD-Q2_K_XL"),
        ("Q4_K_M/model.Q4_K_M.gguf", "Q4_K_M"),
        ("Model.i1-Q4_K_M.gguf", "i1-Q4_K_M"),
        ("Model-Q4_0_4_4.gguf", "Q4_0_4_4"),
        ("Model-TQ1_0.gguf", "TQ1_0"),
        ("Model-Q4_K_M-v2.gguf", "Q4_K_M"),
        ("Qwen2.5-7B-instruct.q5_k_s.gguf", "Q5_K_S"),
        ("Qwen3-Next-80B-A3B.gguf", "Qwen3-Next-80B-A3B"),
    ],
)
def test_the_quant_is_read_from_the_file_or_its_folder(path: str, quant: str) -> None:
    assert [one.quant for one in listing(path).quants] == [quant]


def test_shards_are_one_quant_in_order_whatever_order_they_come_in() -> None:
    names = [f"Q4_K_M/model-Q4_K_M-{n:05d}-of-00003.gguf" for n in (3, 1, 2)]
    [quant] = listing(*names).quants
    assert [file.path for file in quant.files] == sorted(names)
    assert quant.size_bytes == 30 * GIB


def test_an_incomplete_set_is_left_out_and_says_which_shard_is_missing() -> None:
    found = listing("m-Q8_0-00001-of-00003.gguf", "m-Q8_0-00003-of-00003.gguf", "m-Q2_K.gguf")
    assert [one.quant for one in found.quants] == ["Q2_K"]
    assert found.left_out == (("m-Q8_0-00001-of-00003.gguf", "an incomplete set: shard 2 of 3 is missing"),)


@pytest.mark.parametrize(
    ("path", "gib", "word"),
    [
        ("mmproj-F16.gguf", 1.0, "projector"),
        ("imatrix.gguf", 0.2, "importance"),
        ("model.imatrix.gguf", 0.2, "importance"),
        ("ggml-vocab-qwen2.gguf", 0.01, "vocabulary"),
        ("MTP/model-MTP-Q8_0.gguf", 1.0, "draft head"),
        ("model-draft-Q4_K_M.gguf", 0.5, "draft head"),
        ("lora/adapter-F16.gguf", 0.1, "adapter"),
        ("m-Q8_0-00005-of-00003.gguf", 1.0, "impossible"),
        ("empty-Q8_0.gguf", 0.0, "empty"),
    ],
)
def test_what_is_no_model_is_left_out_with_its_reason(path: str, gib: float, word: str) -> None:
    found = listing("model-Q4_K_M.gguf", (path, gib), "README.md")
    assert [one.quant for one in found.quants] == ["Q4_K_M"]
    [(left, reason)] = found.left_out
    assert left == path
    assert word in reason


def test_a_whole_model_named_for_its_mtp_layers_stays() -> None:
    found = listing(("Model-MTP-Q4_K_M.gguf", 20), ("Model-Q8_0.gguf", 38))
    assert [one.quant for one in found.quants] == ["Q8_0", "Q4_K_M"]


def test_a_repository_of_draft_models_alone_offers_them() -> None:
    assert len(listing(("draft-Q4_0.gguf", 0.5), ("draft-Q8_0.gguf", 1)).quants) == 2


def test_two_files_of_one_quant_keep_names_of_their_own() -> None:
    found = listing("model-Q4_K_M.gguf", ("model-imat-Q4_K_M.gguf", 9), ("other/model-Q4_K_M.gguf", 8))
    assert [one.quant for one in found.quants] == ["Q4_K_M", "Q4_K_M-imat", "Q4_K_M-other"]


def test_the_same_contents_under_two_names_are_offered_once() -> None:
    files = [RepoFile("a-Q4_0.gguf", GIB, "same"), RepoFile("old/a-Q4_0.gguf", GIB, "same")]
    found = group_quants("user/repo", "abc", files)
    assert [one.quant for one in found.quants] == ["Q4_0"]
    assert found.left_out == (("old/a-Q4_0.gguf", "the same file as a-Q4_0.gguf"),)


def test_the_largest_comes_first() -> None:
    found = listing(("m-Q2_K.gguf", 3), ("m-BF16.gguf", 16), ("m-Q4_K_M.gguf", 5))
    assert [one.quant for one in found.quants] == ["BF16", "Q4_K_M", "Q2_K"]


words = st.sampled_from(
    ["model", "Q4_K_M", "Q8_0", "UD", "imat", "v2", "x", "00001-of-00002", "00002-of-00002"]
)
paths = st.lists(words, min_size=1, max_size=4).flatmap(
    lambda parts: st.sampled_from(["-", ".", "/", "_"]).map(lambda between: between.join(parts) + ".gguf")
)


@given(st.sets(paths, max_size=8))
def test_every_file_is_in_one_quant_or_left_out_and_no_name_stands_twice(names: set[str]) -> None:
    found = listing(*names)
    quants = [one.quant for one in found.quants]
    assert len(quants) == len(set(quants))
    held = [file.path for quant in found.quants for file in quant.files]
    assert len(held) == len(set(held))
    left = {path for path, _ in found.left_out}
    assert not left & set(held)
    sharded = {name for name in names if "-of-" in name}  # of a set that is left out one stands for all
    assert names - sharded <= left | set(held)


def test_a_quant_is_picked_exactly_and_whatever_its_case() -> None:
    found = listing("m-Q6_K.gguf", "m-UD-Q6_K_XL.gguf")
    assert pick_quant(found, "q6_k").files[0].path == "m-Q6_K.gguf"
    assert pick_quant(found, "UD-Q6_K_XL").files[0].path == "m-UD-Q6_K_XL.gguf"
    assert pick_quant(found, "m-Q6_K.gguf").quant == "Q6_K"
    with pytest.raises(ModelError):
        pick_quant(listing("m-UD-Q6_K_XL.gguf"), "Q6_K")


def test_a_quant_made_with_an_importance_matrix_answers_to_its_plain_name() -> None:
    assert pick_quant(listing("m.i1-Q4_K_M.gguf"), "Q4_K_M").quant == "i1-Q4_K_M"


def test_an_unknown_quant_is_answered_with_the_nearest_and_all_there_are() -> None:
    found = listing("m-Q4_K_M.gguf", "m-UD-Q4_K_XL.gguf", "m-BF16.gguf")
    with pytest.raises(ModelError, match="no quant 'Q4_K_N'") as caught:
        pick_quant(found, "Q4_K_N")
    assert "Did you mean Q4_K_M" in caught.value.hint
    assert all(quant.quant in caught.value.hint for quant in found.quants)


def test_a_file_that_was_left_out_is_refused_with_the_reason() -> None:
    with pytest.raises(ModelError, match="is an image projector"):
        pick_quant(listing("m-Q4_0.gguf", "mmproj-F16.gguf"), "mmproj-F16.gguf")
