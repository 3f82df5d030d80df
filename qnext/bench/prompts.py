"""Prompts of a wanted length that no prefix cache has seen: random common words, other ones each time.

The words are short, all of four letters: one token each for the usual vocabularies and the same number of
bytes for those that fall back to bytes, so that tokens grow evenly with words. How many tokens a word makes
for a model, and how many its chat template adds, is measured once (`fit_length`). Two prompts begin with the
same word once in 250 times: beyond a template's opening there is next to nothing for a cache to know.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

_TEXT = (
    "able also area army away baby back ball band bank base bear beat been bell best bill bird blue boat "
    "body bone book born both bowl busy cake call came camp card care case cell chip city club coal coat "
    "cold come cook cool copy corn cost crew crop dark data date days dead deal deep deer desk dish door "
    "down draw drop dust duty each earn east easy edge face fact fair fall farm fast fear feed feel file "
    "fill film find fine fire fish five flag flat flow food foot form four free full game gate gave gift "
    "girl give glad goal goes gold good gray grew grow half hall hand hard have head hear heat held help "
    "here hero high hill hold hole home hope hour huge idea into iron item join jump just keep kept kind "
    "king knew know lake land last late lead left less life lift like line list live long look loss lost "
    "loud love made mail main make many mark meal mean meat meet mile milk mind mine miss moon more most "
    "move much must name near neck need news next nice nine none noon nose note once only open over pack "
    "page paid pain pair park part pass past path pick plan play poem poor port post pull pure push race "
    "rain rate read real rest rice rich ride ring rise road rock role roof room root rose rule safe said "
    "salt same sand save seat seed seem self sell send "
)
_WORDS = _TEXT.split()

_CLOSING = "\n\nWrite a long story with these words."
"""Keeps models at it that would end their answer early, where the server cannot be told to go on."""


@dataclass(frozen=True, slots=True)
class Length:
    """`tokens_per_word`, and the tokens that template and closing words add to every prompt."""

    tokens_per_word: float = 1.0
    added: float = 0.0

    def words_for(self, tokens: int) -> int:
        """How many words make a prompt of `tokens`; at least one."""
        return max(1, round((tokens - self.added) / self.tokens_per_word))


def fit_length(few: tuple[int, int], many: tuple[int, int]) -> Length:
    """The length's two numbers from two prompts, each (words, tokens counted by the server).

    A server whose count does not grow with the words (it counts wrongly) gives a word a token.
    """
    (few_words, few_tokens), (many_words, many_tokens) = few, many
    per_word = (many_tokens - few_tokens) / (many_words - few_words)
    if per_word <= 0:
        return Length()
    return Length(per_word, max(0.0, few_tokens - per_word * few_words))


class PromptMaker:
    """Makes prompts from one seed; the same seed makes the same prompts in the same order."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def words(self, count: int) -> list[str]:
        """`count` fresh random words."""
        return self._random.choices(_WORDS, k=count)

    @staticmethod
    def text(words: list[str]) -> str:
        """The prompt of these words."""
        return " ".join(words) + _CLOSING
