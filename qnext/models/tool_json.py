"""Calls written as one JSON object: where it ends while it still streams, and what it says."""

from __future__ import annotations

import json
from typing import Literal

LONGEST_NAME = 256
"""Characters of a tool's or an argument's name; what is longer is no name."""

_CLOSE = "</tool_call>"
_OUTSIDE_STRINGS = frozenset(" \t\r\n{}[]:,+-.0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


class ObjectScan:
    """Finds where a JSON object ends without waiting for all of it.

    `at` is how far it has read. A `<` outside strings, or a closing tag on a line of its own inside one
    (strings of JSON have no raw line breaks), shows that the object is broken.
    """

    def __init__(self, at: int) -> None:
        self.at = at
        self.depth = 0
        self.state: Literal["reading", "opened", "ended", "broken"] = "reading"
        self._string = False
        self._escaped = False

    def next(self, text: str, last: bool) -> int:
        """Read on to the next opening brace ("opened": its position), the object's end, a fault, or -1."""
        self.state = "reading"
        while self.at < len(text):
            char = text[self.at]
            if self._string:
                if char == "\n" and not self._escaped:
                    tag = f"\n{_CLOSE}"
                    if text.startswith(tag, self.at):
                        self.state = "broken"
                        return self.at
                    left = len(text) - self.at
                    if not last and left < len(tag) and tag.startswith(text[self.at :]):
                        return -1
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._string = False
            elif char == '"':
                self._string = True
            elif char not in _OUTSIDE_STRINGS:
                self.state = "broken"
                return self.at
            elif char in "{[":
                self.depth += 1
                if char == "{":
                    self.state = "opened"
                    self.at += 1
                    return self.at - 1
            elif char in "}]":
                self.depth -= 1
                if not self.depth:
                    self.state = "ended"
                    self.at += 1
                    return self.at - 1
            self.at += 1
        return -1


def read_call(call: object) -> tuple[str, str] | None:
    """Name and arguments' JSON text of a whole call; None when it is not one.

    Arguments may be left out by a tool that has none, or be a string with the object's text.
    """
    if not isinstance(call, dict) or not isinstance(name := call.get("name"), str) or not name:
        return None
    if len(name) > LONGEST_NAME:
        return None
    arguments = call.get("arguments")
    if arguments is None:
        return name, "{}"
    if isinstance(arguments, str):
        return (name, arguments) if isinstance(load_json(arguments), dict) else None
    return (name, json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


def load_json(text: str) -> object:
    """The JSON value, None when the text is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
