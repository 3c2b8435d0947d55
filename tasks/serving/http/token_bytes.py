"""The bytes of single tokens. A token can be a part of a character, which no text can stand for."""

from __future__ import annotations

import codecs
import re

from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTE = re.compile("<0x([0-9A-F]{2})>")  # how SentencePiece writes a token of one byte


class TokenBytes:
    """The bytes of a tokenizer's tokens.

    Tokens of a byte-level tokenizer have a character for every byte. Others are text; where they have tokens for single
    bytes, these are written <0xNN>.
    """

    def __init__(self, tokenizer):
        self._tokenizer, self._known = tokenizer, {}
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        is_byte_level = decoder is not None and decoder.decode(["aĠa"]) == "a a"
        self._alphabet = {sign: byte for byte, sign in bytes_to_unicode().items()} if is_byte_level else None

    def of(self, token: int) -> bytes:
        """The bytes of a token; of a special one, those of its name; b"" where there is no such token."""
        if token not in self._known:
            self._known[token] = self._find(token)
        return self._known[token]

    def in_text(self, token: int) -> bytes:
        """The bytes that a token adds to a text, which leaves out special tokens."""
        return b"" if token in self._special else self.of(token)

    def _find(self, token: int) -> bytes:
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:
            return b""
        if token in self._special:
            return name.encode()
        if self._alphabet is not None:  # a token with another character is taken as text
            return bytes(map(self._alphabet.get, name)) if self._alphabet.keys() >= set(name) else name.encode()
        alone = self._decode([token])
        if (byte := BYTE.fullmatch(name)) and alone != name:
            return bytes.fromhex(byte[1])
        return self._decode([token] * 2)[len(alone) :].encode()  # at the beginning of a text, a space would be left out

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)


class Offsets:
    """Where the tokens of a text begin in it. A token inside of a character has the offset of the character."""

    def __init__(self):
        self._decoder, self._num = codecs.getincrementaldecoder("utf-8")("replace"), 0

    def next(self, data: bytes) -> int:
        """The number of characters before the next token, which adds these bytes to the text."""
        if data and not 0x80 <= data[0] < 0xC0:  # no continuation, so that nothing can complete the bytes before
            self._num += len(self._decoder.decode(b"", final=True))
        before = self._num
        self._num += len(self._decoder.decode(data))
        return before
