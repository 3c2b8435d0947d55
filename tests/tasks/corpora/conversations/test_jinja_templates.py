"""Templates are rendered as transformers renders them, and the sandbox allows no more than its own."""

import pytest
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import _cached_compile_jinja_template

from tasks.corpora.conversations.jinja_templates import CompiledTemplate

MESSAGES = [{"role": "user", "content": "a {0.__class__} b"}, {"role": "assistant", "content": "c"}]
OBJECTS = ["a text", {"items": 1, "role": "user", "_x": 2}, ["a"], LoopContext([1, 2], None), 3, None]


def outcome(environment, thing, name):
    """What the sandbox gives for an attribute, in a form that can be compared."""
    try:
        found = environment.getattr(thing, name)
    except Exception as error:
        return type(error).__name__
    if isinstance(found, environment.undefined):
        return found._undefined_message, found._undefined_exception.__name__
    return type(found), getattr(found, "__name__", found), getattr(found, "__module__", None)


def test_attributes_are_those_of_the_sandbox():
    own = _cached_compile_jinja_template("").environment
    quick = CompiledTemplate("", {})._compiled.environment
    assert isinstance(own, ImmutableSandboxedEnvironment) and quick.getattr is not own.getattr
    for thing in OBJECTS:
        for name in {*dir(thing), "role", "missing", "__class__", "mro", "_x", "gi_frame"}:
            assert outcome(quick, thing, name) == outcome(own, thing, name), (thing, name)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a'.__class__.__mro__ }}",
        "{{ ''.join.__self__.__class__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ messages[0].content.format(messages) }}",
        "{{ messages[0].content.format_map(messages[0]) }}",
        "{{ 'a'.join(messages) }}",
        "{% for m in messages %}{{ loop.index0 }}{{ loop.last }}{{ m.nothing }}{{ m.items() | list }}{% endfor %}",
        "{% for m in messages %}{{ m.content.split(' ', 1) }}{{ m.content.upper() | trim }}{% endfor %}",
        "{% for m in messages %}{{ loop.__class__ }}{% endfor %}",
        "{{ documents is none }}{{ tools is none }}{{ add_generation_prompt }}{{ bos_token }}{{ nothing is defined }}",
    ],
)
def test_texts_and_errors_are_those_of_transformers(template):
    def result(render):
        try:
            return render()
        except Exception as error:
            return type(error).__name__, str(error)

    own, quick = _cached_compile_jinja_template(template), CompiledTemplate(template, {"bos_token": "<s>"})
    values = {"messages": MESSAGES, "tools": None, "documents": None, "add_generation_prompt": False}
    expected = result(lambda: own.render(**values, bos_token="<s>"))
    assert result(lambda: quick.render(MESSAGES, None)) == expected


def test_nothing_is_left_of_the_last_conversation():
    template = "{% if seen is defined %}again{% endif %}{% set seen = 1 %}{% set tools = 2 %}{{ messages[0].content }}"
    compiled = CompiledTemplate(template + "{{ add_generation_prompt }}", {})
    assert [compiled.render([{"content": c}], None, c == "b") for c in "abc"] == ["aFalse", "bTrue", "cFalse"]
    assert CompiledTemplate("{{ tools }}", {"tools": "mine"}).render(MESSAGES, [{}]) == "mine"  # the user's variable
