"""A grammar that leaves the model nothing to do but call a tool, for `tool_choice` required or a named
function.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qnext.errors import UsageError
from qnext.models.gbnf import literal
from qnext.models.schema_grammar import schema_grammar
from qnext.models.tool_calls import ToolFormat

_ANY_OBJECT = {"type": "object"}
_WORDS = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|#.*|([A-Za-z][\w-]*)')
"""Texts, classes of characters and comments of GBNF, and in a group the names of rules."""


def call_grammar(tools: Sequence[Mapping[str, Any]], style: ToolFormat, *, parallel: bool) -> str:
    """GBNF of a call of one of `tools`, or of several in a row.

    Arguments written as JSON keep to the tool's schema where that can be enforced. In the XML form only the
    beginning is forced: values there are plain text, which the model ends by itself.
    """
    functions = [tool["function"] for tool in tools]
    if style == "xml":
        names = " | ".join(literal(str(function["name"])) for function in functions)
        return f'root ::= "<tool_call>\\n<function=" ({names}) ">\\n" rest\nrest ::= [^\\x00]*\n'
    try:
        body = schema_grammar({"anyOf": [_call(each, each.get("parameters")) for each in functions]})
    except UsageError:
        body = schema_grammar({"anyOf": [_call(each, None) for each in functions]})
    more = ' ("\\n" call)*' if parallel else ""
    calls = '"<tool_call>\\n" called "\\n</tool_call>"'
    return f"root ::= call{more}\ncall ::= {calls}\n" + _rename_root(body, "called")


def either(one: str, other: str) -> str:
    """GBNF of what either grammar allows."""
    return f"root ::= a-root | b-root\n{_prefixed(one, 'a-')}\n{_prefixed(other, 'b-')}"


def _prefixed(grammar: str, prefix: str) -> str:
    """The same grammar with other names for its rules."""
    return _WORDS.sub(lambda found: prefix + found[0] if found[1] else found[0], grammar)


def _call(function: Mapping[str, Any], parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": parameters or _ANY_OBJECT},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _rename_root(grammar: str, name: str) -> str:
    lines = grammar.splitlines()
    return "\n".join(f"{name} {line[5:]}" if line.startswith("root ::=") else line for line in lines) + "\n"
