"""Tool calls told from text while an answer streams.

Two ways of writing a call are in use among the models qnext runs, both between `<tool_call>` and
`</tool_call>`: Qwen3, Qwen3-Next and Hermes write one JSON object with `name` and `arguments`; Qwen3-Coder
writes `<function=NAME>` with one `<parameter=KEY>` block per argument and sometimes forgets the first tag.

A client wants events as early as they are certain, so a call begins when its name is known and its
arguments stream as JSON text from then on. What can no longer become a call is passed on as the text it was,
with a warning. A call that has begun and then breaks off keeps its arguments unfinished, so that no client
can take half of a file for the whole one. Whitespace before a call and after the last one is layout.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qnext.models.tool_json import LONGEST_NAME, ObjectScan, load_json, read_call
from qnext.models.tool_values import json_value, value_types

ToolFormat = Literal["json", "xml"]
Tool = Mapping[str, Any]
"""One entry of OpenAI's `tools`: `{"type": "function", "function": {"name", "parameters", …}}`."""

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.){1,1600}")\s*,\s*"arguments"\s*:\s*', re.DOTALL)
_LAYOUT = 64
"""Most whitespace between `<tool_call>` and the call."""
_VALUE_END = re.compile(rf"\n?(?:{_PARAMETER_END}|{_FUNCTION_END}\n{CLOSE})")
_VALUE_ENDS = tuple(
    start + tag for tag in (_PARAMETER_END, f"{_FUNCTION_END}\n{CLOSE}") for start in ("", "\n")
)


@dataclass(frozen=True, slots=True)
class Said:
    """Text that is no part of a call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call whose name is known. `index` counts the answer's calls from 0; `id` is random."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of a call's arguments: all pieces of a whole call make one JSON object's text."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """No more arguments come for this call. Those of a call that is not `whole` are no valid JSON object."""

    index: int
    whole: bool = True


@dataclass(frozen=True, slots=True)
class Warned:
    """Something about a call was not as it should be. Quotes nothing but names."""

    message: str


ToolEvent = Said | CallBegun | CallArguments | CallEnded | Warned
_Step = Generator[ToolEvent, None, bool]
"""Yields events; returns whether another step may get further with what is held."""


def tool_format(template_source: str) -> ToolFormat | None:
    """How the model of this chat template writes calls, None when it is neither way known here."""
    if OPEN not in template_source:
        return None
    if _FUNCTION in template_source and _PARAMETER in template_source:
        return "xml"
    return "json" if re.search(r'\\?"arguments\\?"', template_source) else None


def longest_overlap(text: str, tags: Sequence[str]) -> int:
    """Length of the longest end of `text` that is a beginning, but not the whole, of one of `tags`.

    Tags begin with `<` or a line break.
    """
    if "<" not in text and "\n" not in text:
        return 0
    longest = max(map(len, tags)) - 1
    return next(
        (n for n in range(min(longest, len(text)), 0, -1) if any(_begins(tag, text[-n:]) for tag in tags)), 0
    )


def _begins(tag: str, start: str) -> bool:
    return len(start) < len(tag) and tag.startswith(start)


class ToolCallParser:
    """Reads one answer. Feed it pieces cut anywhere, then `finish`.

    `tools` gives the types of arguments written as `<parameter=…>`; calls of unknown tools are passed on
    with a warning. Both ways of writing are read whatever `style` is; with "xml" a call may lack its
    `<tool_call>` where it starts a line and names a known tool.
    """

    def __init__(self, tools: Sequence[Tool], style: ToolFormat = "json") -> None:
        functions = [tool.get("function", tool) for tool in tools]
        self._tools = {str(each.get("name")): each.get("parameters") or {} for each in functions}
        self._tags = (OPEN, _FUNCTION) if style == "xml" else (OPEN,)
        self._start = re.compile(rf"{OPEN}|(?<![^\n]){_FUNCTION}" if style == "xml" else OPEN)
        self._step: Callable[[bool], _Step] = self._outside
        self._held = ""
        self._gap: list[str] = []  # whitespace that belongs to a call if one follows
        self._before = "\n"  # the character before what is held
        self._calls = 0
        self._after_call = False

    def feed(self, text: str) -> Iterator[ToolEvent]:
        """Events that are certain with this piece."""
        if text:
            self._held += text
            while (yield from self._step(False)) and self._held:
                pass

    def finish(self) -> Iterator[ToolEvent]:
        """Events for what was held back; the answer is over."""
        while (yield from self._step(True)):
            pass

    # Text

    def _outside(self, last: bool) -> _Step:
        found = self._start.search(self._held)
        if found and found.start() == 0 and found.group() == _FUNCTION and self._before != "\n":
            found = self._start.search(self._held, 1)
        if found:
            yield from self._say(self._take(found.start()))
            self._step = self._opening
            return True
        keep = 0 if last else longest_overlap(self._held, self._tags)
        yield from self._say(self._take(len(self._held) - keep))
        if last and self._gap:
            if not self._after_call:
                yield Said("".join(self._gap))
            self._gap.clear()
        return False

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        if taken:
            self._before = taken[-1]
        return taken

    def _say(self, text: str) -> Iterator[ToolEvent]:
        body = text.rstrip()
        if body:
            yield Said("".join(self._gap) + body)
            self._gap.clear()
            self._after_call = False
        if len(text) > len(body):
            self._gap.append(text[len(body) :])

    def _reject(self, count: int, why: str) -> _Step:
        """What is held up to `count` is no call after all."""
        yield Warned(f"{why}; passed on as text")
        yield from self._say(self._take(count))
        self._step = self._outside
        return True

    # The beginning of a call

    def _opening(self, last: bool) -> _Step:
        if self._held.startswith(_FUNCTION):
            self._lead = ""
            self._step = self._function
            return True
        body = self._held[len(OPEN) :].lstrip()
        self._lead = self._held[: len(self._held) - len(body)]
        if len(self._lead) > len(OPEN) + _LAYOUT:
            return (yield from self._reject(len(self._lead), "a tool call that does not begin"))
        if not last and (not body or _begins(_FUNCTION, body)):
            return False
        if body.startswith("{"):
            self._scan = ObjectScan(len(self._lead))
            self._step = self._object
        elif body.startswith(_FUNCTION):
            self._step = self._function
        else:
            return (yield from self._reject(len(self._lead), "a tool call without a call in it"))
        return True

    def _begin(self, name: str) -> Iterator[ToolEvent]:
        from secrets import token_hex

        self._gap.clear()
        self._index, self._name = self._calls, name
        self._calls += 1
        yield CallBegun(self._index, f"call_{token_hex(12)}", name)
        if name not in self._tools:
            yield Warned(f"call of {name!r}, which is not among the tools")

    def _end(self, braces: int, warning: str = "", *, whole: bool = True) -> Iterator[ToolEvent]:
        """The call is over; `braces` close it before its tag does."""
        yield CallEnded(self._index, whole)
        if warning:
            yield Warned(f"call of {self._name!r}: {warning}")
        self._braces, self._warned, self._after_call = braces, bool(warning), True
        self._step = self._closing

    def _closing(self, last: bool) -> _Step:
        """What stands between the end of a call and its closing tag."""
        rest = self._held.lstrip()
        self._gap.append(self._take(len(self._held) - len(rest)))
        if rest.startswith("}") and self._braces:
            self._take(1)
            self._braces -= 1
            return True
        if not last and (not rest or _begins(CLOSE, rest)):
            return False
        closed = rest.startswith(CLOSE)
        if closed:
            self._take(len(CLOSE))
            self._gap.clear()
        if not self._warned and (self._braces or not closed):
            yield Warned(f"call of {self._name!r} is not closed as it should be")
        self._before = "\n"
        self._step = self._outside
        return True

    # A call as one JSON object

    def _object(self, last: bool) -> _Step:
        scan, held = self._scan, self._held
        lead = len(self._lead)
        while (at := scan.next(held, last)) >= 0 and scan.state == "opened":
            head = _HEAD.fullmatch(held, lead, at) if scan.depth == 2 else None
            name = load_json(head.group(1)) if head else None
            if isinstance(name, str) and len(name) <= LONGEST_NAME:
                yield from self._begin(name)
                self._take(at)
                self._scan = ObjectScan(0)
                self._arguments: list[str] = []
                self._step = self._json_arguments
                return True
        if scan.state == "broken" or (last and scan.state != "ended"):
            end = scan.at if scan.state == "broken" else len(held)
            return (yield from self._reject(end, "a tool call that is not JSON"))
        if scan.state != "ended":
            return False
        call = load_json(held[lead : scan.at])
        found = read_call(call)
        if found is None:
            return (yield from self._reject(scan.at, "a tool call without a name and an object of arguments"))
        self._take(scan.at)
        yield from self._begin(found[0])
        yield CallArguments(self._index, found[1])
        yield from self._end(0)
        return True

    def _json_arguments(self, last: bool) -> _Step:
        scan = self._scan
        while scan.next(self._held, last) >= 0 and scan.state == "opened":
            pass
        if scan.at:
            piece = self._take(scan.at)
            self._arguments.append(piece)
            yield CallArguments(self._index, piece)
            scan.at = 0
        if scan.state == "ended":
            good = isinstance(load_json("".join(self._arguments)), dict)
            yield from self._end(1, "" if good else "its arguments are not valid JSON", whole=good)
        elif scan.state == "broken" or last:
            yield from self._end(0, "its arguments are not finished", whole=False)
        else:
            return False
        return True

    # A call as a function with parameters

    def _function(self, last: bool) -> _Step:
        lead = len(self._lead)
        name, end = self._name_in_tag(lead + len(_FUNCTION))
        if name is None and end < 0 and not last:
            return False
        if name is None or (not self._lead and name not in self._tools):
            return (yield from self._reject(lead + len(_FUNCTION), "a tool call without a known name"))
        self._take(end)
        yield from self._begin(name)
        self._keys = 0
        self._step = self._body
        return True

    def _name_in_tag(self, start: int) -> tuple[str | None, int]:
        """The name up to `>` and where the tag ends; (None, -1) while it may come, (None, 0) if it cannot."""
        end = self._held.find(">", start, start + LONGEST_NAME + 1)
        name = self._held[start : end if end >= 0 else None]
        if "\n" in name or "<" in name or len(name) > LONGEST_NAME:
            return None, 0
        if end < 0:
            return None, -1
        name = name.strip()
        return (name, end + 1) if name else (None, 0)

    def _body(self, last: bool) -> _Step:
        self._held = self._held.lstrip()
        held = self._held
        if held.startswith(_PARAMETER):
            key, end = self._name_in_tag(len(_PARAMETER))
            if key is None and end < 0 and not last:
                return False
            if key is not None:
                self._take(end)
                comma = ", " if self._keys else "{"
                self._keys += 1
                yield CallArguments(self._index, f"{comma}{_quoted(key)}: ")
                self._types = value_types(self._tools.get(self._name, {}), key)
                self._value: list[str] | None = None if self._types <= {"string"} else []
                self._step = self._value_start
                return True
        closing = held.startswith((_FUNCTION_END, CLOSE))
        if closing:
            whole = held.startswith(_FUNCTION_END)
            self._take(len(_FUNCTION_END) if whole else 0)
            yield CallArguments(self._index, "}" if self._keys else "{}")
            yield from self._end(0, "" if whole else f"{_FUNCTION_END} is missing")
            self._warned = self._warned or not self._lead
            return True
        if not last and any(_begins(tag, held) for tag in (_PARAMETER, _FUNCTION_END, CLOSE)):
            return False
        if not last and not held:
            return False
        why = "it is not finished" if last else "it is not written as it should be"
        yield from self._end(0, why, whole=False)
        return True

    def _value_start(self, last: bool) -> _Step:
        if not self._held and not last:
            return False
        # The line break after the tag is dropped; an empty value may have only the one before its end.
        if self._held.startswith("\n"):
            self._take(1)
        if self._value is None:
            yield CallArguments(self._index, '"')
        self._step = self._in_value
        return True

    def _in_value(self, last: bool) -> _Step:
        found = _VALUE_END.search(self._held)
        keep = 0 if last else longest_overlap(self._held, _VALUE_ENDS)
        piece = self._take(found.start() if found else len(self._held) - keep)
        if self._value is not None:
            self._value.append(piece)
        elif piece:
            yield CallArguments(self._index, _quoted(piece)[1:-1])
        if not found:
            if last:
                if self._value:
                    yield CallArguments(self._index, _quoted("".join(self._value))[:-1])
                yield from self._end(0, "it is not finished", whole=False)
            return last
        if self._value is not None:
            text, fits = json_value("".join(self._value), self._types)
            yield CallArguments(self._index, text)
            if not fits:
                yield Warned(f"call of {self._name!r}: an argument is not of its type; passed on as a string")
        else:
            yield CallArguments(self._index, '"')
        tag = found.group().lstrip("\n")
        self._take(found.end() - found.start() - (0 if tag == _PARAMETER_END else len(tag)))
        self._step = self._body
        return True


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
