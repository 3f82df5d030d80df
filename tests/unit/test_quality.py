"""The order of quants: by published figures where there are such, monotone, and honest about which."""

from __future__ import annotations

from itertools import pairwise
from math import exp, log, prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnext.models import quality
from qnext.models.quality import divergence_at, quality_of
from qnext.models.synth.ftypes import FILE_TYPES
from qnext.models.synth.imagined import imagined_header

LADDER = "Q2_K_S Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K Q8_0 BF16"
SMALL_LADDER = "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ2_M IQ3_XXS IQ3_XS IQ3_S IQ3_M IQ4_XS IQ4_NL"
ARCHS = (None, "qwen3next", "qwen3moe", "gpt-oss", "qwen35moe")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("ladder", [LADDER, SMALL_LADDER], ids=["K", "IQ"])
def test_a_plain_ladder_climbs(ladder: str, arch: str | None) -> None:
    scores = [quality_of(name, arch).score for name in ladder.split()]
    assert all(low < high for low, high in pairwise(scores))


@pytest.mark.parametrize("name", quality._LADDER)
def test_a_larger_variant_is_a_little_better_and_an_importance_matrix_of_another_name_the_same(
    name: str,
) -> None:
    assert quality_of(f"i1-{name}").score == quality_of(name).score == quality_of(name.lower()).score
    assert quality_of(f"UD-{name}").score > quality_of(name).score


@pytest.mark.parametrize(
    ("larger", "plain", "next_one"),
    [
        ("Q2_K_L", "Q2_K", "Q3_K_S"), ("Q3_K_XL", "Q3_K_L", "Q4_K_S"), ("Q4_K_L", "Q4_K_M", "Q5_K_S"),
        ("Q5_K_L", "Q5_K_M", "Q6_K"), ("Q6_K_L", "Q6_K", "Q8_0"), ("UD-Q4_K_XL", "Q4_K_M", "Q5_K_S"),
        ("UD-Q8_K_XL", "Q8_0", "BF16"), ("MXFP4_MOE", "Q4_K_S", "Q4_K_M"),
    ],
)  # fmt: skip
def test_named_variants_lie_between_their_neighbours(larger: str, plain: str, next_one: str) -> None:
    assert quality_of(plain).score < quality_of(larger).score < quality_of(next_one).score


def test_published_figures_keep_their_order_and_are_passed_on() -> None:
    published = {
        name: quality_of(name, "qwen3next") for name in ("MXFP4_MOE", "Q4_K_M", "Q5_K_M", "UD-Q5_K_M")
    }
    figures = [one.published_kld for one in published.values()]
    assert figures == [0.0746, 0.0685, 0.0308, 0.0217]
    assert [one.score for one in published.values()] == sorted(one.score for one in published.values())
    assert all("Qwen3-Coder-Next" in one.source and "0.0" in one.source for one in published.values())
    assert quality_of("Q4_K_M", "qwen3moe").published_kld is None


def test_the_scale_of_a_family_is_the_geometric_mean_of_what_both_tables_have() -> None:
    for arch, measured in quality._MEASURED.items():
        ratios = [kld / quality._LADDER[name] for name, kld in measured.items() if name in quality._LADDER]
        mean = exp(sum(map(log, ratios)) / len(ratios))
        assert quality._SCALE[arch] == pytest.approx(mean, rel=0.03)


def test_the_source_says_what_the_order_rests_on() -> None:
    assert quality_of("Q6_K").source == quality.LLAMA_TABLE
    assert (
        quality_of("UD-Q3_K_XL", size_bytes=36_282_685_440, params=79_674_391_296).source == quality.DYNAMIC
    )
    assert quality_of("ROTORQUANT", size_bytes=40, params=80).source == quality.BITS
    assert quality_of("Q7_FANCY").source == quality.NAME
    assert quality_of("BF16").source == quality.ORIGINAL
    assert quality_of("Q4_K_M", "gpt-oss").source == quality.TRAINED


def test_unknown_names_are_placed_by_bits_per_weight() -> None:
    params = 79_674_391_296
    for bits, below, above in (
        (4.6, "IQ4_XS", "Q4_K_M"),
        (6.0, "Q5_K_M", "Q6_K"),
        (2.5, "IQ2_XXS", "IQ3_XXS"),
    ):
        found = quality_of("SOMETHING-NEW", size_bytes=int(bits * params / 8), params=params)
        assert quality_of(below).score < found.score < quality_of(above).score
        assert found.bits_per_weight == pytest.approx(bits)


def test_a_name_without_anything_known_is_poor_rather_than_best() -> None:
    assert quality_of("whatever").poor
    assert quality_of("whatever", size_bytes=0, params=0).poor


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("BF16", "original"), ("Q8_0", "near lossless"), ("Q6_K", "near lossless"), ("Q5_K_M", "good"),
        ("Q4_K_M", "good"), ("IQ4_XS", "good"), ("Q4_0", "noticeable loss"), ("Q3_K_M", "noticeable loss"),
        ("IQ3_XXS", "noticeable loss"), ("Q2_K", "poor"), ("IQ2_XXS", "poor"), ("IQ1_S", "poor"),
    ],
)  # fmt: skip
def test_the_words_people_read(name: str, word: str) -> None:
    found = quality_of(name)
    assert (found.word, found.poor) == (word, word == "poor")


def test_where_rows_do_not_fit_the_types_a_name_says_less_than_the_size() -> None:
    nano = [("Q5_K_S", 23_810_309_056), ("Q4_K_M", 24_515_134_912)]  # mradermacher's Nemotron 3 Nano
    found = [
        quality_of(name, "nemotron_h_moe", size_bytes=size, params=31_600_000_000) for name, size in nano
    ]
    assert found[0].score < found[1].score and {one.source for one in found} == {quality.ODD_ROWS}


def test_files_whose_experts_are_as_trained_are_not_called_poor() -> None:
    for name in ("Q2_K_L", "Q3_K_S", "Q4_K_M", "UD-Q4_K_XL", "Q8_0"):
        assert quality_of(name, "gpt-oss").score > quality_of(name).score
        assert not quality_of(name, "gpt-oss").poor
    assert quality_of("MXFP4", "gpt-oss").word == quality_of("F16", "gpt-oss").word == "original"


@given(st.floats(0.1, 20), st.floats(0.1, 20))
def test_more_bits_never_diverge_more(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert divergence_at(low) >= divergence_at(high) >= 0


@given(st.text(max_size=20), st.integers(0, 1 << 50), st.integers(0, 1 << 42))
def test_any_name_has_a_quality_that_orders(name: str, size: int, params: int) -> None:
    found = quality_of(name, "qwen3next", size_bytes=size, params=params)
    assert 0 <= found.score <= 100 and found.source and found.word


def test_the_curve_has_the_bits_of_real_files() -> None:
    weights = sum(prod(tensor.shape) for tensor in imagined_header("qwen3-next-80b-a3b", "BF16").tensors)
    for bits, name in quality._CURVE:
        assert name in FILE_TYPES
        assert imagined_header("qwen3-next-80b-a3b", name).file_bytes * 8 / weights == pytest.approx(
            bits, abs=1e-3
        )
    assert [bits for bits, _ in quality._CURVE] == sorted(bits for bits, _ in quality._CURVE)
