"""The text of tokens as they come: whole characters only, and nothing that may belong to a stop string."""

from __future__ import annotations

CONTEXT = 5  # tokens before the new ones that decide how these are written, such as with a space in front
BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet one


class TextStream:
    """Turns tokens into text. Special tokens are left out.

    `stopped` is true once the text has had one of the stop strings. The text then ends before it.
    """

    def __init__(self, tokenizer, prompt: list[int], stop: tuple[str, ...] = ()):
        self._tokenizer, self._stop, self.stopped = tokenizer, stop, False
        self._ids = prompt[-CONTEXT:]
        self._start, self._read = 0, len(self._ids)  # where the context begins, and what is text already
        self._held = ""  # text that may be the beginning of a stop string

    def push(self, token: int) -> str:
        """Take a token, and return the text that is certain now. It may be empty."""
        self._ids.append(token)
        new = self._new_text()
        if new.endswith(BROKEN):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._release(new)

    def end(self) -> str:
        """The rest of the text, after the last token."""
        return "" if self.stopped else self._release(self._new_text()) + self._let_go()

    def _new_text(self) -> str:
        before = self._decode(self._ids[self._start : self._read])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _release(self, new: str) -> str:
        self._held += new
        found = [place for text in self._stop if (place := self._held.find(text)) >= 0]
        if found:
            self.stopped, self._held = True, self._held[: min(found)]
            return self._let_go()
        keep = max((_overlap(self._held, text) for text in self._stop), default=0)
        sure, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return sure

    def _let_go(self) -> str:
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`, which is not in it whole."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
