"""Text as its tokens come: the same as the whole text, in whole characters, and up to a stop string."""

import pytest

from tasks.serving.text_stream import TextStream
from tests.support.models import chat, chat_templates

BYTES = chat_templates.chat_tokenizer(chat_templates.CHATML)
LETTERS = chat.chat_tokenizer()


def pieces(tokenizer, text: str, stop=(), prompt: str = "a question ") -> tuple[list[str], bool]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer, tokenizer(prompt, add_special_tokens=False)["input_ids"], stop)
    found = []
    for token in ids:
        found.append(stream.push(token))
        if stream.stopped:
            break
    return [*found, stream.end()], stream.stopped


TEXTS = ["plain words here", "Grüße, 日本 👩‍🚀!", " a  b\n\nc ", "a<|im_end|>b", "", "x\ufffdy\ufffd"]


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_text_in_whole_characters(text):
    ids = BYTES(text, add_special_tokens=False)["input_ids"]
    found, stopped = pieces(BYTES, text)
    assert "".join(found) == BYTES.decode(ids, skip_special_tokens=True) and not stopped
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in found)


def test_bytes_that_become_no_character_come_at_the_end():
    stream = TextStream(BYTES, [])
    half = BYTES("日", add_special_tokens=False)["input_ids"][:2]
    assert [stream.push(token) for token in half] == ["", ""] and stream.end() == "\ufffd"


@pytest.mark.parametrize(
    "text, stop, expected",
    [
        ("one STOP two", ("STOP",), "one "),
        ("one STO two", ("STOP",), "one STO two"),  # what was held back comes
        ("one STO", ("STOP",), "one STO"),
        ("aaab", ("aab",), "a"),
        ("one two three", ("three", "two"), "one "),  # the first in the text, not in the list
        ("abcd", ("bcd", "bc"), "a"),
        ("STOP", ("STOP",), ""),
        ("a\n\nb", ("\n\n",), "a"),
        ("Grüße an", ("ße",), "Grü"),
    ],
)
@pytest.mark.parametrize("tokenizer", [BYTES, LETTERS], ids=["bytes", "letters"])
def test_stop_strings(tokenizer, text, stop, expected):
    if tokenizer is LETTERS and not text.isascii():
        pytest.skip("has ASCII letters only")
    found, stopped = pieces(tokenizer, text, stop)
    assert "".join(found) == expected and stopped == any(one in text for one in stop)
    for i in range(len(found)):  # nothing that a stop string could still take back was given away
        assert expected.startswith("".join(found[:i]))
