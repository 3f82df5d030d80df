"""Byte-level BPE vocabularies: a small one trained on a list of words, and a large one made of syllables.

Both hold all 256 byte tokens, so that any text can be encoded, and every other token is reachable by merges,
as in the real files. The alphabet that stands for bytes is GPT-2's: printable Latin-1 characters stand for
themselves, the rest are moved past U+0100.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

from qnext.models.synth.writer import MetaValue

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Token types of llama.cpp (LLAMA_TOKEN_TYPE_*)."""

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

QWEN_SPECIAL: Mapping[str, int] = {
    "<|endoftext|>": CONTROL,
    "<|im_start|>": CONTROL,
    "<|im_end|>": CONTROL,
    "<|object_ref_start|>": CONTROL,
    "<|object_ref_end|>": CONTROL,
    "<|box_start|>": CONTROL,
    "<|box_end|>": CONTROL,
    "<|quad_start|>": CONTROL,
    "<|quad_end|>": CONTROL,
    "<|vision_start|>": CONTROL,
    "<|vision_end|>": CONTROL,
    "<|vision_pad|>": CONTROL,
    "<|image_pad|>": CONTROL,
    "<|video_pad|>": CONTROL,
    "<tool_call>": USER_DEFINED,
    "</tool_call>": USER_DEFINED,
    "<|fim_prefix|>": CONTROL,
    "<|fim_middle|>": CONTROL,
    "<|fim_suffix|>": CONTROL,
    "<|fim_pad|>": CONTROL,
    "<|repo_name|>": CONTROL,
    "<|file_sep|>": CONTROL,
    "<tool_response>": USER_DEFINED,
    "</tool_response>": USER_DEFINED,
    "<think>": USER_DEFINED,
    "</think>": USER_DEFINED,
}
"""Qwen3's special tokens in the order of their ids (151643 and up in the full vocabulary)."""


HARMONY = (
    "{%- for message in messages %}"
    "{{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"
)

_HARMONY_NAMES = {0: "startoftext", 1: "endoftext", 4: "return", 5: "constrain", 7: "channel", 8: "start"}
_HARMONY_NAMES |= {9: "end", 10: "message", 14: "call"}

GPT_OSS_SPECIAL: Mapping[str, int] = {
    f"<|{_HARMONY_NAMES.get(index, f'reserved_{199998 + index}')}|>": CONTROL for index in range(21)
}
"""gpt-oss's special tokens in the order of their ids (199998 and up in the full vocabulary)."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Token texts (bytes spelled in the alphabet), their types, and merges by rank."""

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]

    def metadata(self, *, pre: str, eos: str, bos: str, template: str) -> dict[str, MetaValue]:
        """The `tokenizer.*` keys of a GGUF. `eos` and `bos` are token texts; `bos` also serves as padding."""
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": self.types,
            "tokenizer.ggml.merges": self.merges,
            "tokenizer.ggml.eos_token_id": self.tokens.index(eos),
            "tokenizer.ggml.bos_token_id": self.tokens.index(bos),
            "tokenizer.ggml.padding_token_id": self.tokens.index(bos),
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.chat_template": template,
        }


def spell(text: str) -> str:
    """`text` as it stands in a byte-level vocabulary: one character per UTF-8 byte."""
    alphabet = _byte_alphabet()
    return "".join(alphabet[byte] for byte in text.encode())


def train_vocabulary(words: Sequence[str], special: Mapping[str, int], *, multiple: int) -> Vocabulary:
    """BPE trained until every word of `words` is one token; padded with unused tokens to `multiple`."""
    spelled = [list(spell(word)) for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for word in spelled for pair in pairwise(word))
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in spelled:
            _merge(word, best)
    merged = dict.fromkeys(left + right for left, right in merges)
    return _assemble([*sorted(_byte_alphabet()), *merged], merges, special, multiple=multiple)


def syllable_vocabulary(size: int, special: Mapping[str, int], first_special: int) -> Vocabulary:
    """`size` tokens: bytes, then words of two to six letters, special tokens from id `first_special` on.

    Lengths and the one merge per token come close to a real vocabulary, so that headers have its size.
    """
    letters = sorted(_byte_alphabet())
    syllables = [(a, b) for a in "bcdfghjklmnpqrstvwxz" for b in "aeiouy"]
    texts = [a + b for a, b in syllables]
    merges = list(syllables)
    parents = texts
    while len(letters) + len(merges) < first_special:
        room = first_special - len(letters) - len(merges)
        grown = list(islice(((parent, text) for text in texts for parent in parents), room))
        merges += grown
        parents = [left + right for left, right in grown]
    merges = merges[: first_special - len(letters)]
    return _assemble([*letters, *(a + b for a, b in merges)], merges, special, size=size)


def _assemble(
    normal: list[str],
    merges: list[tuple[str, str]],
    special: Mapping[str, int],
    *,
    size: int = 0,
    multiple: int = 1,
) -> Vocabulary:
    used = len(normal) + len(special)
    total = max(size, -(-used // multiple) * multiple)
    unused = [f"[PAD{index}]" for index in range(used, total)]
    return Vocabulary(
        tokens=(*normal, *special, *unused),
        types=(*[NORMAL] * len(normal), *special.values(), *[UNUSED] * len(unused)),
        merges=tuple(f"{left} {right}" for left, right in merges),
    )


def _byte_alphabet() -> list[str]:
    """Character for each byte: itself where it is printable Latin-1, else the next one from U+0100 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = (chr(code) for code in range(0x100, 0x200))
    return [chr(byte) if byte in plain else next(moved) for byte in range(256)]


def _merge(word: list[str], pair: tuple[str, str]) -> None:
    index = 0
    while index < len(word) - 1:
        if (word[index], word[index + 1]) == pair:
            word[index : index + 2] = ["".join(pair)]
        index += 1
