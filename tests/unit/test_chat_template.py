"""Chat templates and sampling defaults, which come with the file from strangers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qnext.errors import ModelError
from qnext.models.chat import ChatTemplate, chat_template, sampling_defaults
from qnext.models.gguf_reader import read_header
from qnext.models.header import ModelHeader

JSON_STYLE = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}{{- tool | tojson ~ '\\n' }}{%- endfor %}
    {{- 'Call: <tool_call>{"name": …, "arguments": …}</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\\n' }}
    {%- if message.reasoning_content is defined %}
        {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content }}
    {%- for call in message.tool_calls or [] %}
        {%- if call.function %}{%- set call = call.function %}{%- endif %}
        {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
        {{- call.arguments if call.arguments is string else call.arguments | tojson }}
        {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
XML_STYLE = """
{%- if not tools is defined %}{%- set tools = [] %}{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content }}
    {%- if message.tool_calls is defined and message.tool_calls | length > 0 %}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n<function=' + call.function.name + '>\\n' }}
            {%- for key, value in call.function.arguments|items %}
                {{- '<parameter=' + key + '>\\n' }}
                {{- value | string if value is not mapping else value | tojson }}
                {{- '\\n</parameter>\\n' }}
            {%- endfor %}
            {{- '</function>\\n</tool_call>' }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
TOOL = {"type": "function", "function": {"name": "look", "description": "é"}}


def _call(arguments: object) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": arguments}}


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


def test_tools_and_the_thinking_switch_reach_the_template() -> None:
    template = ChatTemplate(JSON_STYLE)
    asked = [{"role": "user", "content": "Hi"}]
    assert template.render(asked) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert '"description": "é"' in template.render(asked, tools=[TOOL])
    assert template.render(asked, enable_thinking=False).endswith("<think>\n\n</think>\n\n")
    assert template.render(asked, enable_thinking=True) == template.render(asked)
    assert not template.render(asked, add_generation_prompt=False).endswith("assistant\n")
    hostile: dict[str, Any] = {"messages": [], "self": 1, "bos_token": "no", "anything": {"a": 1}}
    assert template.render(asked, **hostile) == template.render(asked)


def test_what_a_template_takes_is_read_from_it() -> None:
    template = ChatTemplate(JSON_STYLE)
    assert template.takes_tools and template.takes_thinking_switch
    template = ChatTemplate(XML_STYLE)
    assert template.takes_tools and not template.takes_thinking_switch
    template = ChatTemplate("{{ messages }} tools enable_thinking {{ thinking_budget }}")
    assert not template.takes_tools and not template.takes_thinking_switch
    assert "thinking_budget" in template.variables
    with pytest.raises(ModelError):
        _ = ChatTemplate("{% if %}").takes_tools


def test_calls_and_their_answers_are_shown_as_the_model_writes_them() -> None:
    raw = '{"a":  1}'
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": [_call(raw)], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "call_1", "content": "42"},
    ]
    shown = ChatTemplate(JSON_STYLE).render(messages)
    assert f'<think>\nhm\n</think>\n\n\n<tool_call>\n{{"name": "look", "arguments": {raw}}}' in shown
    assert "<|im_start|>user\n42<|im_end|>" in shown
    shown = ChatTemplate(XML_STYLE).render(messages)
    assert "<function=look>\n<parameter=a>\n1\n</parameter>\n</function>" in shown
    assert messages[1]["tool_calls"] == [_call(raw)], "the caller's messages stay as they were"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({"a": {"b": "c"}}, '<parameter=a>\n{"b": "c"}\n'),
        ("", "<function=look>\n</function>"),
        (None, "<function=look>\n</function>"),
        ('{"a": "cut o', '<parameter=arguments>\n{"a": "cut o\n'),
        ("[1]", "<parameter=arguments>\n[1]\n"),
    ],
)
def test_arguments_of_any_kind_can_be_shown(arguments: object, shown: str) -> None:
    messages = [{"role": "assistant", "content": "", "tool_calls": [_call(arguments)]}]
    assert shown in ChatTemplate(XML_STYLE).render(messages)
    assert "<tool_call>" in ChatTemplate(JSON_STYLE).render(messages)


def test_text_parts_become_one_text_and_other_parts_are_refused() -> None:
    template = ChatTemplate(JSON_STYLE)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "user\na\nb<|im_end|>" in template.render([{"role": "user", "content": parts}])
    image = {"type": "image_url", "image_url": {"url": "data:…"}}
    with pytest.raises(ModelError, match="'image_url'"):
        template.render([{"role": "user", "content": [*parts, image]}])


def test_the_role_of_a_developer_is_the_systems_where_the_template_does_not_know_it() -> None:
    messages = [{"role": "developer", "content": "Be brief."}]
    assert "<|im_start|>system\n" in ChatTemplate(JSON_STYLE).render(messages)
    assert ChatTemplate("{{ messages[0].role }}{# developer #}").render(messages) == "developer"


def test_keys_without_a_value_are_not_there() -> None:
    message = {"role": "assistant", "content": "a", "reasoning_content": None, "tool_calls": None}
    assert ChatTemplate("{{ messages[0] | tojson }}").render([message]) == (
        '{"role": "assistant", "content": "a"}'
    )


def test_a_template_that_writes_without_end_is_stopped() -> None:
    source = "{% set a = 'x' * 100000 %}{% for i in range(99999) %}{{ a }}{% endfor %}"
    with pytest.raises(ModelError, match="more than 16,777,216 characters"):
        ChatTemplate(source).render([])


def test_marks_of_what_was_trained_on_mean_nothing() -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert ChatTemplate(source).render([{"role": "user", "content": "a"}]) == "a"


def test_ends_of_messages_are_found_in_the_prompt() -> None:
    template = ChatTemplate(JSON_STYLE)
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "u"},
    ]
    rendered = template.render(messages)
    ends = template.message_boundaries(rendered)
    assert ends == [
        len(template.render(messages[:count], add_generation_prompt=False)) for count in range(1, 5)
    ]
    assert rendered[ends[-1] :] == "<|im_start|>assistant\n"


def test_a_template_without_ends_of_messages_has_no_boundaries() -> None:
    assert (
        ChatTemplate("{% for m in messages %}{{ m.content }}\n{% endfor %}").message_boundaries("a\n") == []
    )
    assert ChatTemplate("{{ raise_exception('no') }}").message_boundaries("a") == []
