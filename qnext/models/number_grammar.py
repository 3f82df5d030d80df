"""Numbers between bounds as grammars: digit by digit, since a grammar cannot compare.

Without a bound a number has at most 16 digits, which is what a double holds exactly; a model could
otherwise write digits for ever. Fractions have up to 16 digits too.
"""

from __future__ import annotations

_MOST = 10**16 - 1
_FRACTION = '("." [0-9]{1,16})?'
_ZEROS = '("." "0"{1,16})?'
_MORE_THAN_ZERO = '"." "0"{0,14} [1-9] [0-9]{0,15}'


def integer_grammar(least: int | None, most: int | None) -> str:
    """Integers from `least` to `most`, both inclusive; the caller makes sure that there are some."""
    if least is None and most is None:
        return "integer"
    low, high = _closed(least, most)
    parts = []
    if low < 0:
        parts.append(f'"-" ({_between(max(1, -high), -low)})')
    if high >= 0:
        parts.append(_between(max(low, 0), high))
    return " | ".join(parts)


def number_grammar(least: int | None, most: int | None, *, above: bool, below: bool) -> str:
    """Numbers from `least` to `most`; `above` and `below` leave out the bounds themselves."""
    if least is None and most is None:
        return "number"
    low, high = _closed(least, most)
    above, below = above and least is not None, below and most is not None
    parts = []
    if low < 0:
        nearest, without = (0, True) if high >= 0 else (-high, below)
        parts.append(f'"-" ({_magnitudes(nearest, -low, above=without, below=above)})')
    if high > 0 or (high == 0 and not below):
        nearest, without = (0, False) if low < 0 else (low, above)
        parts.append(_magnitudes(nearest, high, above=without, below=below))
    return " | ".join(parts)


def _closed(least: int | None, most: int | None) -> tuple[int, int]:
    """Both bounds; a missing one lies far beyond the other."""
    far = max(_MOST, 10 * abs(least or 0), 10 * abs(most or 0))
    return (-far if least is None else least, far if most is None else most)


def _magnitudes(low: int, high: int, *, above: bool, below: bool) -> str:
    """Numbers without sign from `low` to `high`, with `low` at least 0."""
    parts = []
    if low < high:
        if above:
            parts.append(f"{_text(low)} {_MORE_THAN_ZERO}")
        first = low + 1 if above else low
        if first < high:
            parts.append(f"({_between(first, high - 1)}) {_FRACTION}")
    if not below and not (above and low == high):
        parts.append(f"{_text(high)} {_ZEROS}")
    return " | ".join(parts)


def _between(low: int, high: int) -> str:
    """Digits of the integers from `low` to `high`, with 0 <= low <= high and no leading zeros."""
    parts = []
    while len(str(low)) < len(str(high)):
        digits = len(str(low))
        if low == 10 ** (digits - 1) and low and len(str(high)) - digits > 1:
            # Every number of these lengths, at once.
            parts.append(f"[1-9] {_any(digits - 1, len(str(high)) - 2)}")
            low = 10 ** (len(str(high)) - 1)
            break
        parts.append(_same_length(str(low), "9" * digits))
        low = 10**digits
    parts.append(_same_length(str(low), str(high)))
    return " | ".join(parts)


def _same_length(low: str, high: str) -> str:
    """Strings of digits from `low` to `high`, both of one length."""
    if low == high:
        return f'"{low}"'
    rest = len(low) - 1
    if low[0] == high[0]:
        return f'"{low[0]}" ({_same_length(low[1:], high[1:])})'
    first, last = int(low[0]), int(high[0])
    head, tail = [], []
    if low[1:] != "0" * rest:
        head.append(f'"{first}" ({_same_length(low[1:], "9" * rest)})')
        first += 1
    if high[1:] != "9" * rest:
        tail.append(f'"{last}" ({_same_length("0" * rest, high[1:])})')
        last -= 1
    middle = [f"[{first}-{last}] {_any(rest, rest)}".rstrip()] if first <= last else []
    return " | ".join(head + middle + tail)


def _any(least: int, most: int) -> str:
    if not most:
        return ""
    return f"[0-9]{{{least}}}" if least == most else f"[0-9]{{{least},{most}}}"


def _text(number: int) -> str:
    return f'"{number}"'
