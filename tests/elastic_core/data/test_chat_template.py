"""Chat templates: the token that ends an assistant's turn, prompts, and what is said where there is no template."""

import pytest

from elastic_core.data.chat_template import end_of_turn_id, knows_thinking, prompt_ids, render, require_chat_template
from elastic_core.errors import UserError
from tests.support.models.chat import CHATML, END, LLAMA3, chat_tokenizer

USER = [{"role": "user", "content": "hi"}]
TURN = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}ENDING{% endfor %}"


@pytest.mark.parametrize(
    "template, token",
    [
        (CHATML, "<|im_end|>"),
        (LLAMA3, "<|eot_id|>"),
        (TURN.replace("ENDING", "{{ eos_token }}"), END),
        (TURN.replace("ENDING", "\n <|eot_id|>\n"), "<|eot_id|>"),  # white space before it
        (TURN.replace("ENDING", "<|im_end|><|eot_id|>"), "<|im_end|>"),  # the first of two
        ({"default": CHATML, "other": LLAMA3}, "<|im_end|>"),
        (TURN.replace("ENDING", "\n"), None),  # text ends the turn
        (TURN.replace("ENDING", ""), None),
        ("{{ raise_exception('no system message') }}", None),
        ("{{ messages.none.such }}", None),
        ("nothing of the messages", None),
        (None, None),
    ],
)
def test_the_token_that_ends_an_assistants_turn(template, token):
    tokenizer = chat_tokenizer(template)
    assert end_of_turn_id(tokenizer) == (None if token is None else tokenizer.convert_tokens_to_ids(token))


@pytest.mark.parametrize("template", [CHATML, LLAMA3])
def test_a_prompt_has_only_the_tokens_of_the_template(template):
    """The tokenizer's own bos is not added: LLAMA3 writes it itself, and CHATML has none."""
    for starts_with_end in (False, True):
        tokenizer = chat_tokenizer(template, starts_with_end)
        expected = tokenizer.apply_chat_template(USER, add_generation_prompt=True, return_dict=False)
        assert prompt_ids(tokenizer, USER) == expected
        assert expected.count(tokenizer.bos_token_id) == (template == LLAMA3)
    assert render(tokenizer, USER) in render(tokenizer, USER, add_generation_prompt=True)


@pytest.mark.parametrize(
    "template",
    ["{{ 1 // 0 }}", "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "{{ none.x.y }}", "{{ 'a' + 1 }}"],
)
def test_every_error_of_a_template_is_one_of_the_user(template):
    with pytest.raises(UserError, match="here: cannot write these messages"):
        render(chat_tokenizer(template), USER, "here")


def test_another_template_than_the_tokenizers_own():
    tokenizer = chat_tokenizer(None)
    end = end_of_turn_id(tokenizer, chat_template=LLAMA3)
    assert end == tokenizer.convert_tokens_to_ids("<|eot_id|>") is not None


def test_thinking_is_a_switch_of_some_templates():
    assert [knows_thinking(chat_tokenizer(t)) for t in (CHATML, LLAMA3, None)] == [True, False, False]
    tokenizer = chat_tokenizer(CHATML)
    off, on = (tokenizer.decode(prompt_ids(tokenizer, USER, enable_thinking=value)) for value in (False, True))
    assert off.endswith("assistant\n<think></think>") and on.endswith("assistant\n")


def test_what_is_said_where_there_is_no_template():
    with pytest.raises(UserError, match=r"here: the tokenizer has no chat template; copy chat_template\.jinja"):
        prompt_ids(chat_tokenizer(None), USER, "here")
    with pytest.raises(UserError, match=r"here: .* no chat template 'tools'; allowed: default, other"):
        require_chat_template(chat_tokenizer({"default": CHATML, "other": LLAMA3}), "here", "tools")
    with pytest.raises(UserError, match=r"here: .* no chat template 'tools'; allowed: true, because it has a single"):
        require_chat_template(chat_tokenizer(CHATML), "here", "tools")
    require_chat_template(chat_tokenizer({"default": CHATML, "other": LLAMA3}), "here", "other")
    with pytest.raises(UserError, match=r"here: cannot write these messages \(TemplateError: users first\)"):
        render(chat_tokenizer("{{ raise_exception('users first') }}"), USER, "here")
