"""Regular expressions of JSON schemas as grammars for what stands between a string's quotes.

The subset that clients send: literals, classes, groups, alternatives, repetitions, anchors at the ends. As
in JSON schema, a pattern without anchors may stand anywhere in the string. A character that JSON writes
escaped is written with its short escape.
"""

from __future__ import annotations

from typing import NoReturn

from qnext.errors import UsageError
from qnext.models.gbnf import MOST_REPEATS, GrammarWriter, Ranges, char_class, literal

_ESCAPED = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}
_LAST = 0x10FFFF
_UNWRITABLE = ((0, 0x1F), (ord('"'), ord('"')), (ord("\\"), ord("\\")), (0xD800, 0xDFFF))
_DIGITS = ((48, 57),)
_WORD = ((48, 57), (65, 90), (95, 95), (97, 122))
_SPACE = ((9, 13), (32, 32), (0xA0, 0xA0), (0x2028, 0x2029))
_CLASSES: dict[str, Ranges] = {"d": _DIGITS, "w": _WORD, "s": _SPACE}


def pattern_grammar(pattern: str, writer: GrammarWriter, path: str) -> str:
    """What matches `pattern`, as JSON writes it. Raises UsageError, naming `path`, for what cannot be."""
    return _Reader(pattern, writer, path).read()


class _Reader:
    def __init__(self, pattern: str, writer: GrammarWriter, path: str) -> None:
        self._pattern, self._writer, self._path = pattern, writer, path
        self._at = 0

    def read(self) -> str:
        """Each alternative may be anchored by itself."""
        branches = []
        while True:
            start = "" if self._took("^") else "char*"
            body, _ = self._sequence(top=True)
            end = "" if self._took("$") else "char*"
            branches.append(" ".join(filter(None, (start, body, end))) or '""')
            if not self._took("|"):
                break
        if self._at < len(self._pattern):
            self._refuse(f"{self._pattern[self._at]!r} where it stands")
        return " | ".join(branches)

    def _took(self, text: str) -> bool:
        found = self._pattern.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found

    def _next(self) -> str:
        if self._at >= len(self._pattern):
            self._refuse("its end")
        self._at += 1
        return self._pattern[self._at - 1]

    def _refuse(self, what: str) -> NoReturn:
        raise UsageError(
            f"the schema's pattern at {self._path} cannot be enforced: {what}",
            hint="Write it with literals, classes, groups, | and repetitions alone, or leave it out.",
        )

    def _sequence(self, *, top: bool = False) -> tuple[str, bool]:
        """Items up to the end of a branch, and whether all of them may be empty."""
        items, empty = [], True
        while self._at < len(self._pattern):
            char = self._pattern[self._at]
            if char in "|)" or (top and char == "$"):
                break
            item, nullable = self._repeated(*self._atom())
            items.append(item)
            empty = empty and nullable
        return " ".join(filter(None, items)), empty

    def _atom(self) -> tuple[str, bool]:
        char = self._next()
        if char == "(":
            return self._group()
        if char == "[":
            return self._class(), False
        if char == ".":
            return self._any_of(_without(((10, 10), (13, 13), (0x2028, 0x2029)))), False
        if char == "\\":
            return self._any_of(self._escape()), False
        if char in "^$*+?{":
            self._refuse(f"{char!r} where it stands")
        return self._any_of(((ord(char), ord(char)),)), False

    def _group(self) -> tuple[str, bool]:
        if self._took("?") and not self._took(":"):
            self._refuse(f"a group that begins with (?{self._pattern[self._at : self._at + 1]}")
        branches = [self._sequence()]
        while self._took("|"):
            branches.append(self._sequence())
        if not self._took(")"):
            self._refuse("a group without an end" if self._at == len(self._pattern) else "'$' in a group")
        body = " | ".join(text or '""' for text, _ in branches)
        return self._writer.add(body), any(nullable for _, nullable in branches)

    def _repeated(self, item: str, nullable: bool) -> tuple[str, bool]:
        start = self._at
        if self._took("*"):
            least, most = 0, None
        elif self._took("+"):
            least, most = 1, None
        elif self._took("?"):
            least, most = 0, 1
        elif self._took("{"):
            least, most = self._counts()
        else:
            return item, nullable
        self._took("?")  # lazy or not, the same texts match
        if self._at < len(self._pattern) and self._pattern[self._at] in "*+?{":
            self._refuse("a repetition of a repetition")
        if nullable and most != 1:
            self._refuse(f"{self._pattern[start : self._at]!r} after what may be empty")
        if most is not None and (most < least or least > MOST_REPEATS):
            self._refuse(f"{self._pattern[start : self._at]!r}")
        name = item if item.startswith("[") or item.isalnum() else self._writer.add(item)
        return self._writer.repeat(name, least, most), nullable or least == 0

    def _counts(self) -> tuple[int, int | None]:
        end = self._pattern.find("}", self._at)
        low, comma, high = self._pattern[self._at : end if end >= 0 else self._at].partition(",")
        if not (low.isascii() and low.isdigit() and len(low) < 8 and len(high) < 8) or (
            high and not (high.isascii() and high.isdigit())
        ):
            self._refuse("'{' without counts")
        self._at = end + 1
        if not comma:
            return int(low), int(low)
        return int(low), int(high) if high else None

    def _class(self) -> str:
        negated = self._took("^")
        ranges: list[tuple[int, int]] = []
        first = True
        while first or not self._took("]"):
            first = False
            low = self._member()
            if len(low) == 1 and low[0][0] == low[0][1] and self._pattern[self._at : self._at + 1] == "-":
                if self._pattern[self._at + 1 : self._at + 2] == "]":
                    ranges.extend(low)
                    continue
                self._at += 1
                high = self._member()
                if len(high) != 1 or high[0][0] != high[0][1] or high[0][0] < low[0][0]:
                    self._refuse("a range in a class")
                ranges.append((low[0][0], high[0][0]))
            else:
                ranges.extend(low)
        return self._any_of(_without(ranges) if negated else ranges)

    def _member(self) -> Ranges:
        char = self._next()
        if char == "[" and self._pattern.startswith(":", self._at):
            self._refuse("a named class")
        return self._escape(in_class=True) if char == "\\" else ((ord(char), ord(char)),)

    def _escape(self, *, in_class: bool = False) -> Ranges:
        char = self._next()
        if char.lower() in _CLASSES:
            ranges = _CLASSES[char.lower()]
            return ranges if char.islower() else _without(ranges)
        if char in "xu":
            count = 2 if char == "x" else 4
            digits = self._pattern[self._at : self._at + count]
            if len(digits) != count or any(digit not in "0123456789abcdefABCDEF" for digit in digits):
                self._refuse(f"\\{char} without {count} digits")
            self._at += count
            return ((int(digits, 16), int(digits, 16)),)
        if char == "b" and in_class:
            return ((8, 8),)
        if char.isalnum() and char not in _CONTROLS:
            self._refuse(f"\\{char}")
        point = ord(_CONTROLS.get(char, char))
        return ((point, point),)

    def _any_of(self, ranges: Ranges) -> str:
        """One character of `ranges` as JSON writes it: a literal, a class or a rule's name."""
        written = _without([*_without(ranges), *_UNWRITABLE])
        escaped = [
            literal(spelled)
            for char, spelled in _ESCAPED.items()
            if any(low <= ord(char) <= high for low, high in ranges)
        ]
        if not written and not escaped:
            self._refuse("a class without characters that JSON can hold")
        if not escaped:
            return char_class(written)
        if len(escaped) == 1 and not written:
            return escaped[0]
        return self._writer.add(" | ".join([char_class(written)] * bool(written) + escaped))


def _without(ranges: Ranges) -> Ranges:
    """All code points but these."""
    left, start = [], 0
    for low, high in sorted(ranges):
        if low > start:
            left.append((start, low - 1))
        start = max(start, high + 1)
    return [*left, (start, _LAST)] if start <= _LAST else left
