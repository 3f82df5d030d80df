"""How much of a model a quant keeps: an order of quants, and on which published figures it rests.

The measure is the mean Kullback-Leibler divergence (KLD) of a quant's next-token distribution from the
unquantised model's, in nats. Only one complete ladder of plain quants is published: llama.cpp's, for a dense
8B model. For the models here there are a few figures at most. They are brought to the ladder's scale, because
divergences of different models and texts cannot be compared, only their order and ratios: Qwen3-Coder-Next
measured 2.6 times the ladder's figures at 4 and 5 bits, other models a fifth of them.

Dynamic quants (`UD-…`) do not keep to one recipe: UD-Q4_K_XL of Qwen3-Coder-Next was once 45.2 GiB and later
46.2 GiB. They are therefore placed by the file's bits per weight, where its size is known.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass
from math import exp, log

LLAMA_TABLE = "llama.cpp's divergence table for Llama 3 8B (tools/perplexity/README.md)"
CODER_NEXT = "the divergences published for Qwen3-Coder-Next"
DYNAMIC = "bits per weight on llama.cpp's divergence table, less 4 % as Unsloth published for dynamic quants"
BITS = "bits per weight on llama.cpp's divergence table; no divergence is published for this quant"
ODD_ROWS = (
    "bits per weight on llama.cpp's divergence table; this model's rows do not fit the types in its name"
)
NAME = "the bits in its name; neither divergence nor size is known"
TRAINED = "its name; the experts stay MXFP4 as trained, and no divergence is published"
ORIGINAL = "16 bits or more: the published weights"

_LADDER = {
    "Q8_0": 0.001355, "Q6_K": 0.005452, "Q5_K_M": 0.010762, "Q5_K_S": 0.016595, "Q5_1": 0.018045,
    "Q5_0": 0.022239, "Q4_K_M": 0.028152, "Q4_K_S": 0.031951, "IQ4_NL": 0.035742, "IQ4_XS": 0.036334,
    "Q4_1": 0.071683, "Q4_0": 0.071940, "Q3_K_L": 0.073077, "Q3_K_M": 0.084358, "IQ3_M": 0.102534,
    "IQ3_S": 0.111278, "IQ3_XS": 0.138693, "IQ3_XXS": 0.183625, "Q3_K_S": 0.199821, "IQ2_M": 0.325989,
    "Q2_K": 0.332223, "Q2_K_S": 0.403360, "IQ2_S": 0.439197, "IQ2_XS": 0.546290, "IQ2_XXS": 0.812022,
    "IQ1_M": 1.393084, "IQ1_S": 2.254554,
}  # fmt: skip
"""Mean KLD from LLAMA_TABLE, the rows with an importance matrix where there are such: that is how most are
published. Without one a quant is worse by up to a level (Q4_K_M 0.0313, Q3_K_S 0.228, Q2_K 0.445)."""

_CURVE = (
    (1.647, "IQ1_S"), (2.128, "IQ2_XXS"), (3.103, "IQ3_XXS"), (4.287, "IQ4_XS"), (4.567, "Q4_K_S"),
    (4.868, "Q4_K_M"), (5.521, "Q5_K_S"), (5.698, "Q5_K_M"), (6.579, "Q6_K"), (8.515, "Q8_0"),
)  # fmt: skip
"""Bits per weight of whole files of a large mixture of experts (Qwen3-Next-80B by `imagined_header`), of the
types that give most for their bits. A small dense model's files hold more, being largely vocabulary."""

_MEASURED = {
    "qwen3next": {"MXFP4_MOE": 0.0746, "Q4_K_M": 0.0685, "Q5_K_M": 0.0308, "UD-Q5_K_M": 0.0217},
}
"""Published mean KLD per architecture: Qwen3-Coder-Next on wikitext-2, 583 chunks of 512 tokens, llama.cpp
with Vulkan (r/LocalLLaMA, "quantization shootout on Qwen3-Coder-Next"; top-1 agreement 89.4, 89.6, 93.0 and
94.0 %)."""
_SCALE = {"qwen3next": 2.6}
"""What _MEASURED has to be divided by to lie on the ladder: the geometric mean over the names on both."""

_DYNAMIC_FACTOR = 0.96
"""KLD of Unsloth's dynamic quants against their earlier ones, median of seven from IQ1_S to Q4_K_XL of
Gemma 3 (docs.unsloth.ai, "Unsloth Dynamic 2.0 GGUFs")."""
_LARGER_FACTOR = 0.98
"""`…_L` and `…_XL` of plain names keep vocabulary and output in Q8_0: a little better, by no figure."""
_TRAINED_SHARE = 1 / 3
"""gpt-oss: of 3.6 B active weights about a third are not experts (OpenAI's gpt-oss model card, table 1)."""
_TRAINED = {"gpt-oss"}
_ODD_ROWS = {"nemotron_h_moe", "gemma4"}
"""Rows of 2688 or 704 weights are no whole blocks of 256, so llama-quantize gives most experts larger types
than the file's name says: Q4_K_M of Nemotron 3 Nano is larger than its Q5_K_S."""
_ORIGINAL = {"F32", "F16", "BF16"}

_LEVELS = ((0.0, "original"), (0.006, "near lossless"), (0.05, "good"), (0.3, "noticeable loss"))
"""Highest KLD on the ladder of each word; beyond is poor. After the share of tokens where quant and original
agree (same README, "Same top p"): Q6_K of Llama 3 8B 96.0 % at 0.0055, Q4_K_M 91.9 % at 0.031, Q2_K of
Llama 2 7B 85.6 % at 0.109, Q2_K of Llama 3 8B 71.1 % at 0.445. So near lossless is 96 tokens of 100, good
about 90, noticeable loss 75."""
POOR = "poor"

_PREFIX = re.compile(r"^(?:UD-|I1-)")
_NOMINAL = re.compile(r"^I?T?Q(\d)")


@dataclass(frozen=True, slots=True)
class Quality:
    """What a quant keeps. `score` is 100 * exp(-KLD): the geometric mean, in percent, of the probability that
    the quant leaves to what the original would say. It orders quants of one model and is no benchmark result.

    `word` says the level for people, `poor` marks what nobody should be given unasked. `bits_per_weight` is
    of the whole file. `source` says what the order rests on. `published_kld` is the figure measured for this
    architecture and quant, where there is one.
    """

    score: float
    word: str
    poor: bool
    bits_per_weight: float | None
    source: str
    published_kld: float | None = None


def quality_of(
    quant: str, arch: str | None = None, *, size_bytes: int | None = None, params: int | None = None
) -> Quality:
    """Quality of a quant by its published name (`Q4_K_M`, `UD-Q4_K_XL`, `i1-IQ3_M`), any case.

    `arch` is llama.cpp's name. `size_bytes` of the whole file and `params` (weights of the whole model) give
    the bits per weight; they place dynamic quants and names that are not known.
    """
    name = quant.upper()
    bits = 8 * size_bytes / params if size_bytes and params else None
    published = _MEASURED.get(arch or "", {}).get(name)
    if arch in _TRAINED:
        divergence, source = _trained_divergence(name, bits)
    elif name in _ORIGINAL:
        divergence, source = 0.0, ORIGINAL
    elif arch in _ODD_ROWS and bits is not None:
        divergence, source = divergence_at(bits), ODD_ROWS
    elif published is not None and arch is not None:
        divergence, source = published / _SCALE[arch], f"{CODER_NEXT}: {published} for this quant"
    else:
        divergence, source = _divergence(name, bits)
    known = bits if bits is not None else next((at for at, on in _CURVE if on == name), None)
    word = next((word for most, word in _LEVELS if divergence <= most), POOR)
    return Quality(100 * exp(-divergence), word, word == POOR, known, source, published)


def divergence_at(bits: float) -> float:
    """KLD that the ladder has at so many bits per weight: its logarithm is nearly straight between two types.

    0 from 16 bits on; below the first type the line is carried on.
    """
    if bits >= 16:
        return 0.0
    places = [at for at, _ in _CURVE]
    right = min(max(bisect_left(places, bits), 1), len(_CURVE) - 1)
    (low, worse), (high, better) = _CURVE[right - 1], _CURVE[right]
    part = (bits - low) / (high - low)
    return exp(log(_LADDER[worse]) * (1 - part) + log(_LADDER[better]) * part)


def _divergence(name: str, bits: float | None) -> tuple[float, str]:
    """KLD on the ladder's scale, and where it is from."""
    base = _PREFIX.sub("", name)
    if name.startswith("UD-") and bits is not None:
        return _DYNAMIC_FACTOR * divergence_at(bits), DYNAMIC
    if base in ("MXFP4", "MXFP4_MOE"):
        return _MEASURED["qwen3next"]["MXFP4_MOE"] / _SCALE["qwen3next"], CODER_NEXT
    plain, factor = _plain_name(base)
    if plain is not None:
        if name.startswith("UD-"):
            return _DYNAMIC_FACTOR * _LADDER[plain], f"{LLAMA_TABLE} for {plain}, its size not being known"
        return factor * _LADDER[plain], LLAMA_TABLE if factor == 1 else f"{LLAMA_TABLE}, just above {plain}"
    if bits is not None:
        return divergence_at(bits), BITS
    digit = _NOMINAL.match(base)
    return divergence_at(int(digit.group(1)) + 0.5 if digit else 0.0), NAME


def _plain_name(base: str) -> tuple[str | None, float]:
    """The row of the ladder for a name, and a factor on its KLD: `Q4_K_XL` is a little better than Q4_K_M."""
    if base in _LADDER:
        return base, 1.0
    stem = re.sub(r"_X?L$", "", base)
    larger = {"Q2_K": "Q2_K", "Q3_K": "Q3_K_L", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "Q6_K": "Q6_K"}
    if stem != base and stem in larger:
        return larger[stem], _LARGER_FACTOR
    return ("Q8_0", _LARGER_FACTOR) if base == "Q8_K_XL" else (None, 1.0)


def _trained_divergence(name: str, bits: float | None) -> tuple[float, str]:
    """KLD where the experts are stored as they were trained and only the rest follows the file's name."""
    if name in _ORIGINAL or name.startswith("MXFP4"):
        return 0.0, "the experts are MXFP4 as trained, the rest is as published"
    plain, factor = _plain_name(_PREFIX.sub("", name))
    rest = factor * _LADDER[plain] if plain is not None else _divergence(name, None)[0]
    return _TRAINED_SHARE * rest, TRAINED
