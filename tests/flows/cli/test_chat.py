"""`elastic generate --chat`: the prompt is a user's message, and the answer ends with the assistant's turn."""

import json

import pytest

from elastic_core import extract
from elastic_core.data.chat_template import prompt_ids
from tasks.commands import generate
from tests.support.models.chat import LLAMA3, chat_tokenizer, write_family
from tests.support.pipeline.command_line import call, error_of


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    directory = tmp_path_factory.mktemp("family")
    write_family(directory, "42<|im_end|>")
    return directory


def error_of_generate(*arguments):
    """The error, without the line before it that names the directory."""
    name, error = call("generate", *arguments, status=1).splitlines()
    assert str(arguments[1]) in name and error.startswith("error: ")
    return error


def test_an_answer_ends_with_the_turn(family, tmp_path):
    """By the family, and by the extracted model. The model would go on with "x" up to the limit."""
    assert call("generate", "-m", family, "-b", "small", "--chat", "six times seven?", "-n", 9).strip() == "42"
    extract(family, "small", tmp_path / "small")
    assert call("generate", "-m", tmp_path / "small", "-c", "six times seven?", "-n", 9).strip() == "42"
    assert call("generate", "-m", family, "-b", "small", "a text", "-n", 9).strip() == "x" * 9


def test_the_prompt_is_what_the_template_writes(family, monkeypatch):
    prompts = []
    monkeypatch.setattr(generate, "_continue", lambda model, tokenizer, prompt, *_: prompts.append(prompt))
    options = ([], ["--system", "Be brief."], ["--think"], ["--no-think"])
    for given in options:
        call("generate", "-m", family, "-b", "full", "-c", "hi", *given)
    user, tokenizer = {"role": "user", "content": "hi"}, chat_tokenizer()
    system = {"role": "system", "content": "Be brief."}
    plain, brief = prompt_ids(tokenizer, [user]), prompt_ids(tokenizer, [system, user])
    assert prompts == [plain, brief, plain, prompt_ids(tokenizer, [user], enable_thinking=False)]
    assert len({tuple(prompt) for prompt in prompts}) == 3


def test_what_a_chat_needs_is_named(family, tmp_path):
    for option in (["--system", "x"], ["--think"], ["--no-think"]):
        assert f"{option[0]}: needs --chat" in error_of("generate", "-m", family, "-b", "small", "hi", *option)
    assert "no tokens" in error_of_generate("-m", family, "-b", "small", "--chat", "")
    chat = ("-b", "small", "--chat", "hi")
    write_family(tmp_path / "bare", "42", template=None)
    assert "--chat: the tokenizer has no chat template; copy" in error_of_generate("-m", tmp_path / "bare", *chat)
    write_family(tmp_path / "llama", "42", template=LLAMA3)
    for option in ("--think", "--no-think"):
        text = error_of_generate("-m", tmp_path / "llama", *chat, option)
        assert f"{option}: the chat template has no switch enable_thinking" in text


def test_an_older_family_without_a_generation_config_stops_too(family, tmp_path):
    """Neither has it the list of eos ids in config.json."""
    write_family(tmp_path / "old", "42<|im_end|>")
    (tmp_path / "old/generation_config.json").unlink()
    values = json.loads((tmp_path / "old/config.json").read_text())
    (tmp_path / "old/config.json").write_text(json.dumps(values | {"eos_token_id": 0}))
    assert call("generate", "-m", tmp_path / "old", "-b", "small", "--chat", "hi", "-n", 9).strip() == "42"
