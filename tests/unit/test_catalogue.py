"""Every shipped model is described truly as far as can be checked here, and is found by what people type."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from qnext.errors import ModelError
from qnext.models import catalogue
from qnext.models.catalogue import (
    CatalogueModel,
    catalogue_names,
    find_model,
    load_catalogue,
    matching_repo,
    nearest_models,
    read_catalogue_file,
)
from qnext.models.quality import quality_of
from qnext.models.shape import quant_in_name
from qnext.models.synth import SHAPES
from qnext.models.synth.ftypes import FILE_TYPES
from qnext.models.synth.imagined import imagined_header
from qnext.units import MIB

MODELS = load_catalogue()
EACH = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)

PLAIN_LADDERS = (
    "Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K Q8_0 BF16",
    "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ2_M IQ3_XXS IQ3_XS IQ3_S IQ3_M IQ4_XS IQ4_NL Q4_K_S",
)

FAMILY = """
qwen3-next-80b-a3b-instruct qwen3-next-80b-a3b-thinking qwen3-coder-next gpt-oss-20b gpt-oss-120b
qwen3-30b-a3b-instruct-2507 qwen3-30b-a3b-thinking-2507 qwen3-coder-30b-a3b-instruct qwen3.5-35b-a3b
qwen3.6-35b-a3b qwen3.5-122b-a10b qwen3-235b-a22b-instruct-2507 qwen3-235b-a22b-thinking-2507 glm-4.5-air
minimax-m2 nemotron-3-nano-30b-a3b nemotron-3-super-120b-a12b deepseek-v3-0324 mixtral-8x7b-instruct
mixtral-8x22b-instruct gemma-4-26b-a4b
"""

VOCABULARY_BYTES = {"qwen3next": 6.5 * MIB, "qwen3moe": 6.5 * MIB, "gpt-oss": 13 * MIB}
"""Most that vocabulary and metadata take in a file of the architecture (tests/unit/test_synth_types.py)."""


def test_the_models_people_run_are_there() -> None:
    assert set(FAMILY.split()) <= set(catalogue_names())


@EACH
def test_names_and_repositories_have_the_form_that_is_typed(model: CatalogueModel) -> None:
    for name in (model.name, *model.aliases):
        assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name), name
    for repo in (model.repo, *model.alternatives, model.original):
        assert re.fullmatch(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*", repo), repo
    assert all(repo.lower().endswith("-gguf") for repo in (model.repo, *model.alternatives))
    assert not model.original.lower().endswith("-gguf")


def test_no_name_or_repository_stands_for_two_models() -> None:
    names = [name for model in MODELS for name in (model.name, *model.aliases)]
    repos = [repo for model in MODELS for repo in (model.repo, *model.alternatives, model.original)]
    assert len(names) == len(set(names))
    assert len(repos) == len({repo.lower() for repo in repos})


@EACH
def test_a_model_is_found_by_name_alias_and_repository_in_any_case(model: CatalogueModel) -> None:
    for name in (model.name, *model.aliases, model.name.upper(), f" {model.name} "):
        assert find_model(name) == model, name
    for repo in (model.repo, *model.alternatives, model.original, model.repo.lower()):
        assert matching_repo(repo) == model, repo


@EACH
def test_every_fact_is_possible_and_has_a_source(model: CatalogueModel) -> None:
    assert model.sources and all(len(source) > 20 for source in model.sources)
    assert 0 < model.active_params < model.total_params
    assert 0 < model.experts_used < model.experts
    assert 0 < model.layers < 200 and 4096 <= model.context_train <= 1 << 21
    assert model.yarn is None or (model.yarn.factor > 1 and model.yarn.original_context >= 4096)
    for bad in model.bad_files:
        assert bad.files and bad.reason and bad.source


@EACH
def test_sampling_is_in_range(model: CatalogueModel) -> None:
    assert len({sampling.mode for sampling in model.sampling}) == len(model.sampling)
    for sampling in model.sampling:
        assert 0 <= sampling.temperature <= 2
        assert sampling.top_p is None or 0 < sampling.top_p <= 1
        assert sampling.top_k is None or 0 < sampling.top_k <= 100
        assert sampling.min_p is None or 0 <= sampling.min_p < 1
        assert sampling.presence_penalty is None or 0 <= sampling.presence_penalty <= 2
        assert sampling.repeat_penalty is None or 1 <= sampling.repeat_penalty <= 1.5


@EACH
def test_what_thinks_says_between_which_texts_and_what_can_be_switched_says_how(
    model: CatalogueModel,
) -> None:
    thinking = model.thinking
    thinks = thinking.switch != "never"
    assert bool(thinking.open) == bool(thinking.close) == thinks
    assert bool(thinking.how) == (thinking.switch in ("default-on", "default-off", "effort"))


@EACH
def test_quants_have_known_names_and_sizes_that_ascend(model: CatalogueModel) -> None:
    names, sizes = [name for name, _ in model.quants], [size for _, size in model.quants]
    assert all(quant_in_name(f"model-{name}.gguf") == name for name in names)
    assert all(size > 0 for size in sizes) and sizes == sorted(sizes)
    assert len(names) == len(set(names))
    assert all(1.5 < 8 * size / model.total_params < 17 for size in sizes)


@EACH
def test_a_larger_file_of_a_ladder_is_a_better_one(model: CatalogueModel) -> None:
    sizes = dict(model.quants)
    scores = {
        name: quality_of(name, model.arch, size_bytes=size, params=model.total_params).score
        for name, size in model.quants
    }
    ladders = [[name for name in ladder.split() if name in sizes] for ladder in PLAIN_LADDERS]
    if model.name == "nemotron-3-nano-30b-a3b":  # its rows do not fit K types, so that names say little
        ladders = [list(sizes)]
    for ladder in (*ladders, [name for name in sizes if name.startswith("UD-")]):
        assert ladder == sorted(ladder, key=sizes.__getitem__) == sorted(ladder, key=scores.__getitem__)


@EACH
def test_sizes_are_those_of_the_shape_and_a_vocabulary(model: CatalogueModel) -> None:
    if model.shape is None:
        return
    shape = SHAPES[model.shape]
    assert (shape.arch, shape.layers, shape.experts, shape.used, shape.context) == (
        (model.arch, model.layers, model.experts, model.experts_used, model.context_train)
    )
    checked = 0
    for name, size in model.quants:
        if name not in FILE_TYPES:
            continue
        over = size - imagined_header(model.shape, name).file_bytes
        exact = name in ("Q8_0", "BF16") or model.arch != "qwen3next"
        if exact:
            assert 0 < over < VOCABULARY_BYTES[model.arch], name
            checked += 1
        elif name != "MXFP4_MOE":  # its recipe is the publisher's own
            assert abs(over) < 0.006 * size, name  # an importance matrix changes some tensors' types
    assert checked >= min(2, len(model.quants))


def test_no_more_files_are_parsed_than_hold_the_word(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []

    def spy(path: Path) -> CatalogueModel:
        parsed.append(path.stem)
        return read_catalogue_file(path)

    monkeypatch.setattr(catalogue, "read_catalogue_file", spy)
    assert find_model("gpt-oss-20b") is not None
    assert parsed == ["gpt-oss-20b"]
    parsed.clear()
    assert matching_repo("unsloth/MiniMax-M2-GGUF") is not None
    assert parsed == ["minimax-m2"]
    parsed.clear()
    assert find_model("no-such-model") is None and matching_repo("nobody/nothing") is None
    assert find_model("") is None and matching_repo("") is None
    assert parsed == []


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("qwen3-next-80b-a3b-instuct", "qwen3-next-80b-a3b-instruct"),
        ("gptoss-120b", "gpt-oss-120b"),
        ("qwen3-codernext", "qwen3-coder-next"),
        ("GLM4.5-air", "glm-4.5-air"),
    ],
)
def test_a_mistyped_name_gets_the_one_that_was_meant(typed: str, meant: str) -> None:
    assert nearest_models(typed)[0] == meant


def test_a_name_like_none_gets_no_suggestion() -> None:
    assert nearest_models("xyzzy") == ()


GOOD = """
title: A model
aliases: []
repo: someone/A-GGUF
original: maker/A
arch: qwen3moe
total_params: 30_000_000_000
active_params: 3_000_000_000
layers: 48
experts: 128
experts_used: 8
context_train: 262144
thinking: {switch: never}
license: mit
sources: [its model card]
"""


def test_a_file_with_the_least_is_read_and_quants_are_ordered_by_size(tmp_path: Path) -> None:
    path = tmp_path / "a-model.yaml"
    path.write_text(GOOD)
    model = read_catalogue_file(path)
    assert (model.name, model.quants, model.tool_style) == ("a-model", (), None)
    path.write_text(GOOD + "quants: {Q8_0: 20, Q4_0: 10}\n")
    assert read_catalogue_file(path) == replace(model, quants=(("Q4_0", 10), ("Q8_0", 20)))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("layers:", "layer:"), "'layer' is not a known key, did you mean 'layers'?"),
        (
            ("{switch: never}", "{swich: never}"),
            "'thinking.swich' is not a known key, did you mean 'switch'?",
        ),
        (("license: mit\n", ""), "'license' is missing"),
        (("layers: 48", "layers: '48'"), "layers has to be a whole number, not '48'"),
        (("layers: 48", "layers: true"), "layers has to be a whole number, not True"),
        (("aliases: []", "aliases: a"), "aliases has to be a list, not 'a'"),
        (("aliases: []", "aliases: [1]"), "aliases.0 has to be a text, not 1"),
        (("switch: never", "switch: sometimes"), "thinking.switch has to be one of never, always"),
        (("license: mit", "license: mit\nlayers: 3"), "the key 'layers' is there twice"),
        (("license: mit", "license: mit\nname: x"), "without a name"),
        (("license: mit", "license: mit\nquants: [Q4_0]"), "cannot be used"),
        (("license: mit", "license: mit\nquants: {Q4_0: 1.5}"), "quants.0.1 has to be a whole number"),
        (("license: mit", "license: mit\nyarn: 4"), "yarn has to be a mapping"),
        (("license: mit", "license: [mit"), "cannot be used"),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path: Path, change: tuple[str, str], told: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(GOOD.replace(*change))
    with pytest.raises(ModelError) as caught:
        read_catalogue_file(path)
    assert told in caught.value.message and "broken.yaml" in caught.value.message
