"""The chat template with which profile nemotron-nano-12b-v2 renders its data: prompts as the parent writes them."""

from collections import Counter

import pytest

from elastic_core.errors import UserError
from tasks.corpora.conversations.messages import Fields, conversation
from tasks.corpora.conversations.rendering import LOST_THINKING, ChatTemplate
from tests.support.committed_params import ROOT
from tests.support.models.chat_templates import chat_tokenizer

TEMPLATE = (ROOT / "profiles/parents/NVIDIA-Nemotron-Nano-12B-v2/training_template.jinja").read_text()
SPECIAL = ("<|endoftext|>", "<|im_end|>", "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>")
# What transformers makes of a user's message "2+2?" with the parent's own template and add_generation_prompt.
PROMPT = "<SPECIAL_10>System\n\n<SPECIAL_11>User\n2+2?\n<SPECIAL_11>Assistant\n"


def rendered(*messages, **fields):
    """The text, what of it is trained, and what was counted."""
    template, counts = ChatTemplate(chat_tokenizer(TEMPLATE, SPECIAL), TEMPLATE), Counter()
    given = [{"role": role, "content": content} for role, content in messages]
    given[-1] |= fields
    found = template.documents(conversation({"messages": given}, Fields(), "row 1"), counts)
    if not found:
        return None
    (one,) = found
    return one.text, [one.text[start:end] for start, end in one.spans], +counts


@pytest.mark.parametrize(
    ("content", "fields"),
    [
        ("<think>\nA sum.\n</think>\n\n4", {}),
        ("A sum.\n</think>\n\n4", {}),
        ("4", {"reasoning_content": "A sum."}),
    ],
)
def test_thinking_stands_once_and_is_learnt(content, fields):
    text, spans, counts = rendered(("user", "2+2?"), ("assistant", content), **fields)
    answer = "A sum.\n</think>\n\n4\n<SPECIAL_12>"
    assert text == f"{PROMPT}<think>\n{answer}\n" and spans == [answer] and not counts


@pytest.mark.parametrize("content", ["4", "<think></think>4", "<think>\n\n</think>\n\n4"])
def test_an_answer_without_thinking_has_the_prompt_of_no_think(content):
    text, spans, _ = rendered(("user", "2+2?"), ("assistant", content))
    assert text == f"{PROMPT}<think></think>4\n<SPECIAL_12>\n" and spans == ["4\n<SPECIAL_12>"]


def test_earlier_turns_are_read_without_their_thinking():
    turns = [("system", "Be brief. /think"), ("user", "1+1?"), ("assistant", "<think>\nA.\n</think>\n\n2")]
    text, spans, counts = rendered(*turns, ("user", "2+2?"), ("assistant", "<think>\nB.\n</think>\n\n4"))
    start = "<SPECIAL_10>System\nBe brief.\n<SPECIAL_11>User\n1+1?\n<SPECIAL_11>Assistant\n2\n<SPECIAL_12>\n"
    answer = "B.\n</think>\n\n4\n<SPECIAL_12>"
    assert text == f"{start}<SPECIAL_11>User\n2+2?\n<SPECIAL_11>Assistant\n<think>\n{answer}\n"
    assert spans == [answer] and counts[LOST_THINKING] == 1


def test_switches_in_messages_are_not_part_of_the_prompt():
    text, *_ = rendered(("system", "/no_think"), ("user", "2+2? /think"), ("assistant", "4"))
    assert text == f"{PROMPT}<think></think>4\n<SPECIAL_12>\n"


def test_rows_that_it_cannot_write():
    assert rendered(("user", "2+2?"), ("assistant", "4"), ("user", "5+5?")) is None  # skipped and counted
    with pytest.raises(UserError, match=r"row 1: .*role 'tool'; allowed: system \(first\), user and assistant"):
        rendered(("user", "2+2?"), ("tool", "4"), ("assistant", "4"))
