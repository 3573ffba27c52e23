"""Chat templates render as `transformers` renders them, whatever they take of what it adds to Jinja."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from l4ctx.checkpoint import chat_environment as environment_module
from l4ctx.checkpoint import chat_template
from l4ctx.checkpoint.chat_environment import chat_environment

MESSAGES = [
    {"role": "system", "content": 'Be <brief> & "kind".'},
    {"role": "user", "content": "Où est l'été?"},
    {"role": "assistant", "content": "Là."},
]
VARIABLES: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}

RENDERED = [
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "a\n  {%- generation -%}\n  b {{ bos_token }} \n {%- endgeneration -%}\n c",
    "a\n  {% generation %}\nb\n  {% endgeneration %}\nc\n",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ loop.index }}{{ m.content }}{% endif %}{% endfor %}",
    "{% macro say(m) %}{% generation %}<{{ m.content }}>{% endgeneration %}{% endmacro %}"
    "{% for m in messages %}{{ say(m) }}{% endfor %}",
    "{% generation %}a{% generation %}b{% endgeneration %}c{% endgeneration %}",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "{% set n = namespace(x=1) %}{% generation %}{% set n.x = n.x + 1 %}{% endgeneration %}{{ n.x }}",
    "{% generation %}{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}"
    "{% endfor %}{% endgeneration %}",
    "{% generation %}{% endgeneration %}",
    "{% filter upper %}{% generation %}a{% endgeneration %}{% endfilter %}",
    "{{ messages | tojson }}",
    "{{ messages | tojson(ensure_ascii=true) }}",
    "{{ messages | tojson(true, 2) }}",
    "{{ messages[0] | tojson(indent=4) }}",
    "{{ messages[0] | tojson(separators=(',', ':')) }}",
    "{{ {'b': 1, 'a': [1, none, true]} | tojson(sort_keys=true) }}",
    "{{ messages | tojson(indent=2, separators=(',', ' : '), sort_keys=true, ensure_ascii=true) }}",
    "{% for m in messages %}{% if m.role == 'user' %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "{{ strftime_now('%d %b %Y') }}",
    "{{ strftime_now(format='%Y') }}",
    "{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }} {{ tools is defined }} {{ other }}",
    "{% if tools is not none %}x{% endif %}{{ bos_token }}{{ pad_token is defined }}",
    "{{ dict(a=1, b=2) }} {{ dict.fromkeys(['a'], 3) }}",
    "{{ namespace(self=1).self }}",
    "{% set n = namespace({'a': 1}, b=2) %}{{ n.a + n.b }}",
    "{{ messages | map(attribute='role') | join(', ') }} {{ range(3) | list }} {{ 'a b'.split() | last }}",
]
REFUSED = [
    "{% generation %}",
    "{% endgeneration %}",
    "{{ raise_exception('no') }}",
    "{{ namespace(_x=1) }}",
    "{% set n = namespace() %}{% set n._x = 1 %}",
    "{{ messages.append(1) }}",
    "{{ dict.mro() }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages | tojson(form=1) }}",
]


def rendered(template: str) -> str:
    variables = VARIABLES | {"messages": MESSAGES, "tools": None, "documents": None, "add_generation_prompt": True}
    return chat_environment().from_string(template).render(variables)


def by_transformers(template: str) -> str:
    texts, _ = render_jinja_template(
        conversations=[MESSAGES], chat_template=template, add_generation_prompt=True, **VARIABLES
    )
    return str(texts[0])


@pytest.mark.parametrize("template", RENDERED)
def test_templates_render_as_in_transformers(template: str) -> None:
    assert rendered(template) == by_transformers(template)


@pytest.mark.parametrize("template", RENDERED)
def test_the_confined_process_renders_the_same(template: str) -> None:
    now, variables = datetime.datetime.now(), VARIABLES | {"tools": None, "documents": None}
    variables |= {"messages": MESSAGES, "add_generation_prompt": True}
    expected = environment_module.render(template, variables, now)
    assert chat_template.render_confined(template, variables, "the template", now) == expected


@pytest.mark.parametrize("template", REFUSED)
def test_what_transformers_refuses_is_refused(template: str) -> None:
    for render in (rendered, by_transformers):
        with pytest.raises((TemplateError, TypeError)):
            render(template)


def test_all_that_transformers_adds_is_there() -> None:
    """A later release that adds a filter, a test or a global fails here."""
    from transformers.utils import chat_template_utils

    theirs: Any = chat_template_utils._compile_jinja_template("").environment
    ours: Any = chat_environment()
    assert theirs.filters.keys() == ours.filters.keys() and theirs.tests.keys() == ours.tests.keys()
    assert theirs.globals.keys() == ours.globals.keys()
    assert {tag for extension in theirs.extensions.values() for tag in extension.tags} == {
        tag for extension in ours.extensions.values() for tag in extension.tags
    }


def test_the_date_can_be_given() -> None:
    date = datetime.datetime(2024, 2, 29)
    assert chat_environment(date).from_string("{{ strftime_now('%d %m %Y') }}").render() == "29 02 2024"
