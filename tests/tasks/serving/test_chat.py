"""`elastic chat`: questions and commands as lines, answers by the budget of the moment."""

import io

import pytest
import torch
from transformers import AutoModelForCausalLM

from elastic_core import extract
from elastic_core.errors import UserError
from tasks.serving.chat import chat
from tests.support.models.chat import chat_tokenizer
from tests.support.models.served_family import write_served_family


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("chat")
    write_served_family(directory / "family", "llama")
    return directory


def talk(monkeypatch, capsys, directory, lines: list[str], **options) -> tuple[str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    chat(directory / "family", **{"budget": None, "max_new_tokens": 5, **options})
    return tuple(capsys.readouterr())


def answer(directory, budget: str, messages: list[tuple[str, str]]) -> str:
    """Of the extracted model, to all that was said before."""
    if not (directory / budget).exists():
        extract(directory / "family", budget, directory / budget)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory / budget), chat_tokenizer()
    said = [{"role": role, "content": content} for role, content in messages]
    prompt = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=5)[0, prompt["input_ids"].shape[1] :]
    return tokenizer.decode(output, skip_special_tokens=True)


def test_budgets_answer_in_turn(monkeypatch, capsys, directory):
    lines = ["one?", "/budget small", "two?", "/undo", "three?", "/new", "four?", "/budget", "/quit", "never?"]
    out, err = talk(monkeypatch, capsys, directory, lines, system="be brief")
    said = [("system", "be brief"), ("user", "one?")]
    first = answer(directory, "full", said)
    said.append(("assistant", first))
    second = answer(directory, "small", [*said, ("user", "two?")])
    third = answer(directory, "small", [*said, ("user", "three?")])
    fourth = answer(directory, "small", [said[0], ("user", "four?")])
    assert out == "".join(f"{text}\n" for text in (first, second, third, fourth))
    assert "small: 7,536 parameters" in err and "forgotten" in err


def test_a_wrong_line_does_not_end_the_conversation(monkeypatch, capsys, directory):
    lines = ["/budget huge", "/what", "/hand-over maybe", "/undo", "a" * 600, "one?"]
    out, err = talk(monkeypatch, capsys, directory, lines, budget="medium")
    assert out == answer(directory, "medium", [("user", "one?")]) + "\n"
    assert err.count("error: ") == 5
    for part in ("budget: got 'huge'", "got '/what'", "nothing was asked yet", "allowed: fewer than 512"):
        assert part in err


def test_wrong_options_are_refused(directory):
    for options, message in (
        ({"max_new_tokens": 0}, "--max-new-tokens: got 0"),
        ({"temperature": float("nan")}, "--temperature: got nan"),
        ({"device": "abacus"}, "--device: got 'abacus'"),
        ({"budget": "huge"}, "budget: got 'huge'"),
    ):
        with pytest.raises(UserError, match=message):
            chat(directory / "family", **{"budget": None, **options})
    extract(directory / "family", "small", directory / "alone")
    with pytest.raises(UserError, match=r"no elastic\.json"):
        chat(directory / "alone", None)
    assert torch.is_grad_enabled()
