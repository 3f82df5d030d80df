"""llama.cpp itself reads the grammars and lets exactly the right texts through."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qnext.models.response_grammar import response_grammar
from qnext.models.schema_grammar import schema_grammar

pytestmark = pytest.mark.engine

_PROGRAM = """
import ctypes, json, math, sys
from qnext.engine.llama.binding import llama
lib = llama()
lib.llama_backend_init()
params = lib.llama_model_default_params()
params.vocab_only = True
model = lib.llama_model_load_from_file(sys.argv[1].encode(), params)
vocab = lib.llama_model_get_vocab(model)
eos = lib.llama_vocab_eos(vocab)

def allowed(grammar, text):
    sampler = lib.llama_sampler_init_grammar(vocab, grammar.encode(), b"root")
    if not sampler:
        return "refused"
    data = text.encode()
    tokens = (lib.llama_token * (len(data) + 8))()
    count = lib.llama_tokenize(vocab, data, len(data), tokens, len(tokens), False, False)
    for token in [*tokens[:count], eos]:
        one = (lib.llama_token_data * 1)(lib.llama_token_data(token, 1.0, 0.0))
        array = lib.llama_token_data_array(one, 1, -1, False)
        lib.llama_sampler_apply(sampler, ctypes.byref(array))
        if math.isinf(one[0].logit):
            return False
        if token != eos:
            lib.llama_sampler_accept(sampler, token)
    lib.llama_sampler_free(sampler)
    return True

print(json.dumps([allowed(*case) for case in json.load(sys.stdin)]))
"""

_PERSON: dict[str, Any] = {
    "$defs": {"Friend": {"anyOf": [{"$ref": "#/$defs/Person"}, {"type": "null"}]}},
    "$ref": "#/$defs/Person",
}
_PERSON["$defs"]["Person"] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-zé ]+$"},
        "born": {"type": "string", "format": "date"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "share": {"type": "number", "minimum": 0, "maximum": 1},
        "tags": {"type": "array", "items": {"enum": ["a", 'q"\\']}, "minItems": 1, "maxItems": 1200},
        "note": {"type": "string", "minLength": 1, "maxLength": 40000},
        "friend": {"$ref": "#/$defs/Friend"},
    },
    "required": ["name", "age"],
    "additionalProperties": {"type": "boolean"},
}
_GOOD: list[dict[str, Any]] = [
    {"name": "José", "age": 150},
    {"name": "Ann", "born": "1999-12-31", "age": 0, "share": 0.25, "tags": ["a", 'q"\\'] * 20},
    {
        "name": "Bo",
        "age": 7,
        "note": "🌧 \n" * 300,
        "friend": {"name": "Al", "age": 8, "friend": None},
        "nam": True,
    },
]
_BAD: list[dict[str, Any]] = [
    {"name": "josé", "age": 1},
    {"name": "Ann", "age": 151},
    {"name": "Ann", "age": 1, "share": 1.5},
    {"name": "Ann", "age": 1, "tags": []},
    {"name": "Ann", "age": 1, "name ": 1},
    {"name": "Ann"},
]


def test_llama_cpp_lets_through_what_is_valid_and_nothing_else(demo_model: Path) -> None:
    person = schema_grammar(_PERSON)
    anything = response_grammar({"type": "json_object"}) or ""
    cases = [(person, json.dumps(value, ensure_ascii=False), True) for value in _GOOD]
    cases += [(person, json.dumps(value), False) for value in _BAD]
    cases += [(anything, json.dumps(value, indent=2), True) for value in _GOOD]
    cases += [(anything, "[1]", False), (anything, '{"a": 1', False)]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(demo_model)],
        input=json.dumps([case[:2] for case in cases]),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert json.loads(done.stdout) == [case[2] for case in cases], done.stderr[-2000:]
