"""What `response_format` asks for, as a grammar for the engine's sampler."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qnext.errors import UsageError
from qnext.models.gbnf import GrammarWriter
from qnext.models.schema_grammar import schema_grammar

_MOST_GRAMMAR = 256 << 10
"""Characters of a client's own grammar."""


def response_grammar(response_format: Mapping[str, Any] | None) -> str | None:
    """GBNF with the rule `root`, None where any text will do. Raises UsageError.

    Forms: `text`; `json_object` (any object, or llama-server's `schema` beside it); `json_schema` with the
    schema inside `json_schema` (chat completions) or beside it (responses); `grammar` or `gbnf` with the
    text in `grammar`, which the engine checks.
    """
    if response_format is None:
        return None
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object" and response_format.get("schema") is None:
        return GrammarWriter().text("object")
    if kind in ("json_object", "json_schema"):
        holder = response_format.get("json_schema", response_format)
        schema = holder.get("schema") if isinstance(holder, Mapping) else None
        if schema is None:
            raise UsageError(
                "response_format of type json_schema has no schema",
                hint='Send {"type": "json_schema", "json_schema": {"name": …, "schema": {…}}}.',
            )
        return schema_grammar(schema)
    if kind in ("grammar", "gbnf"):
        return checked_grammar(response_format.get("grammar"))
    raise UsageError(
        f"response_format cannot be of type {str(kind)[:40]!r}",
        hint="Send one of text, json_object, json_schema or grammar.",
    )


def checked_grammar(grammar: object) -> str:
    """A client's own GBNF, as far as it can be checked without the engine. Raises UsageError."""
    if not isinstance(grammar, str) or not re.search(r"^\s*root\s*::=", grammar, re.MULTILINE):
        raise UsageError("the grammar has no rule named root", hint='Begin it with "root ::= …" (GBNF).')
    if len(grammar) > _MOST_GRAMMAR or "\0" in grammar:
        raise UsageError(
            f"the grammar is no text of at most {_MOST_GRAMMAR:,} characters", hint="Make it shorter."
        )
    return grammar
