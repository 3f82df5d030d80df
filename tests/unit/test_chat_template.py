"""Chat templates and sampling defaults, which come with the file from strangers."""

from __future__ import annotations

from pathlib import Path

import pytest

from qnext.errors import ModelError
from qnext.models.chat import ChatTemplate, chat_template, sampling_defaults
from qnext.models.gguf_reader import read_header
from qnext.models.header import ModelHeader


def _header(**metadata: object) -> ModelHeader:
    keys = {name.replace("__", "."): value for name, value in metadata.items()}
    return ModelHeader((Path("x.gguf"),), 0, 3, 32, keys, ())


def test_the_demos_template_opens_the_assistants_turn(demo_model: Path) -> None:
    template = chat_template(read_header(demo_model))
    assert template is not None
    prompt = template.render(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>&"}]
    )
    assert "Be brief." in prompt
    assert "Hi <b>&" in prompt, "HTML is not escaped"
    assert prompt.rstrip().endswith("assistant")


def test_no_template_is_none() -> None:
    assert chat_template(_header()) is None
    assert chat_template(_header(tokenizer__chat_template="")) is None


def test_what_templates_of_transformers_use_is_there() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}"
        "{{ m.role }}={{ m['content'] | tojson }}{% endfor %}{{ eos_token }}{{ strftime_now('%Y')[:2] }}"
        "{{ {'a': 'é'} | tojson(indent=None) }}{% if tools %}no{% endif %}{{ add_generation_prompt }}"
    )
    said = ChatTemplate(source, bos="<s>", eos="</s>").render(
        [{"role": "user", "content": "<é>"}, {"role": "user", "content": "later"}]
    )
    assert said == '<s>user="<é>"</s>20{"a": "é"}True'


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{% if %}",
        "{{ nothing.there }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content + 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append({}) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ 'a' + 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages[0].content.nothing() }}",
    ],
)
def test_a_template_that_fails_or_attacks_is_one_explained_error(source: str) -> None:
    with pytest.raises(ModelError, match="chat template cannot be used") as caught:
        ChatTemplate(source).render([{"role": "user", "content": "hi"}])
    assert "--raw" in caught.value.hint


def test_a_templates_own_complaint_is_passed_on() -> None:
    with pytest.raises(ModelError, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render([])


def test_sampling_comes_from_the_file_and_else_from_llama_cpp() -> None:
    header = _header(general__sampling__temp=0.6, general__sampling__top_k=20)
    assert sampling_defaults(header) == {"temperature": 0.6, "top_k": 20.0, "top_p": 0.95, "min_p": 0.05}


def test_a_sampling_entry_of_the_wrong_type_is_ignored() -> None:
    header = _header(general__sampling__temp="hot", general__sampling__top_k=True)
    assert sampling_defaults(header) == sampling_defaults(_header())
