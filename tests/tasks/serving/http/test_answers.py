"""Log-probabilities in answers: the bytes of every token, and where it begins in the text."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tasks.serving.http.answers import Answer, Text
from tasks.serving.http.token_bytes import Offsets, TokenBytes
from tasks.serving.jobs import Piece
from tasks.serving.sampling import Chosen
from tasks.serving.text_stream import TextStream
from tests.support.models import chat, chat_templates

BYTES = chat_templates.chat_tokenizer(chat_templates.CHATML)
WORDS = ["<s>", "▁so", "▁", "me", "▁▁", *(f"<0x{byte:02X}>" for byte in "ü日".encode()), "é", "�"]
SPACES = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def sentencepiece(decoder) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<s>"))
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def answers(tokenizer, ids: list[int], prompt: list[int], **options) -> tuple[Text, list[dict]]:
    """What a text of these tokens is told as: the text, and the choices of the whole answer and of all chunks."""
    chosen = [Chosen(token, -1.0, ((token, -1.0),)) for token in ids]
    stream, text = TextStream(tokenizer, prompt), Text(len(prompt))
    text.pieces = [Piece(stream.push(one.token), (one,)) for one in chosen] + [Piece(stream.end(), (), "stop")]
    answer, offsets = Answer(options.get("chat", False), "small", TokenBytes(tokenizer), True), Offsets()
    chunks = [answer.chunk(0, piece, offsets)["choices"][0] for piece in text.pieces]
    return text, [answer.whole([text], {})["choices"][0], *chunks]


@pytest.mark.parametrize("text", ["plain words here", "Grüße, 日本 👩‍🚀!", " a  b\n\nc ", "x\ufffdy\ufffd"])
def test_tokens_have_the_bytes_of_the_text_and_begin_where_the_tokenizer_says(text):
    coded = BYTES(text, add_special_tokens=False, return_offsets_mapping=True)
    said, (whole, *chunks) = answers(BYTES, coded["input_ids"], BYTES("a")["input_ids"])
    assert said.whole().text == text
    assert whole["logprobs"]["text_offset"] == [start for start, _ in coded["offset_mapping"]]
    offsets = [offset for chunk in chunks for offset in chunk["logprobs"]["text_offset"]]
    assert offsets == whole["logprobs"]["text_offset"]
    entries = answers(BYTES, coded["input_ids"], [], chat=True)[1][0]["logprobs"]["content"]
    assert bytes(byte for entry in entries for byte in entry["bytes"]) == text.encode()
    for entry in entries:
        assert entry["token"] == bytes(entry["bytes"]).decode(errors="replace")
        assert entry["top_logprobs"][0]["bytes"] == entry["bytes"]


@pytest.mark.parametrize("decoder", [decoders.Sequence(SPACES), decoders.Metaspace()], ids=["replace", "metaspace"])
def test_spaces_of_sentencepiece(decoder):
    tokenizer = sentencepiece(decoder)
    ids = [1, 3, 4, 3, 1, 2, 10, 1]
    said, (whole, *_) = answers(tokenizer, ids, [3])
    assert said.whole().text == " some  me so é so"
    assert whole["logprobs"]["tokens"] == [" so", "me", "  ", "me", " so", " ", "é", " so"]
    assert whole["logprobs"]["text_offset"] == [0, 3, 5, 7, 9, 12, 13, 14]


def test_bytes_that_are_no_character():
    """The key is OpenAI's; tokens of the same name do not hide the likelier one; special tokens are not in the text."""
    tokenizer = sentencepiece(decoders.Sequence(SPACES))
    said, (whole, *_) = answers(tokenizer, [1, 5, 6, 0, 7, 8, 9, 3, 99], [3])
    assert said.whole().text == " soü日me"
    names = [" so", "bytes:\\xc3", "bytes:\\xbc", "<s>", "bytes:\\xe6", "bytes:\\x97", "bytes:\\xa5", "me", ""]
    assert whole["logprobs"]["tokens"] == names
    assert [list(entry) for entry in whole["logprobs"]["top_logprobs"]] == [[name] for name in names]
    assert whole["logprobs"]["text_offset"] == [0, 3, 3, 4, 4, 4, 4, 5, 7]
    answer = Answer(False, "small", TokenBytes(tokenizer), True)
    piece = Piece("", (Chosen(3, -1.0, ((3, -1.0), (98, -2.0), (99, -3.0))),))
    assert answer.chunk(0, piece, Offsets())["choices"][0]["logprobs"]["top_logprobs"] == [{"me": -1.0, "": -2.0}]


def test_bytes_that_never_become_a_character():
    first = BYTES("日", add_special_tokens=False)["input_ids"][0]
    ids = [first, *BYTES("a日b", add_special_tokens=False)["input_ids"]]
    said, (whole, *_) = answers(BYTES, ids, BYTES("a")["input_ids"])
    assert said.whole().text == "\ufffda日b"
    assert [whole["logprobs"]["text_offset"][i] for i in (0, 1, 2, -1)] == [0, 1, 2, 3]


def test_plain_text_is_no_bytes():
    tokens = TokenBytes(chat.chat_tokenizer())
    letters = chat.chat_tokenizer()("aé<", add_special_tokens=False)["input_ids"]
    assert tokens.of(letters[0]) == b"a" and tokens.of(letters[-1]) == b"<"
    ordinary = sentencepiece(decoders.Fuse())
    assert TokenBytes(ordinary).of(5) == b"<0xC3>"
