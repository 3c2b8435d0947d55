"""What clients get: the bodies of OpenAI's interface."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field

from tasks.serving.http.token_bytes import Offsets, TokenBytes
from tasks.serving.jobs import Piece
from tasks.serving.sampling import Chosen


@dataclass
class Text:
    """What has come of one choice. `num_prompt` and `num_cached`: tokens of its prompt."""

    num_prompt: int
    pieces: list[Piece] = field(default_factory=list)

    @property
    def num_cached(self) -> int:
        return self.pieces[0].num_cached if self.pieces else 0

    @property
    def num_new(self) -> int:
        return sum(len(piece.tokens) for piece in self.pieces)

    def whole(self) -> Piece:
        """All pieces as one."""
        tokens = tuple(token for piece in self.pieces for token in piece.tokens)
        return Piece("".join(piece.text for piece in self.pieces), tokens, self.pieces[-1].finish)


def usage(texts: list[Text], num_choices: int) -> dict:
    """Counts of tokens. A prompt with several choices counts once."""
    prompt = sum(text.num_prompt for text in texts[::num_choices])
    new = sum(text.num_new for text in texts)
    cached = sum(text.num_cached for text in texts[::num_choices])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class Answer:
    """Writes the answer to one request, whole or in chunks. `chat`: as messages, or else as texts."""

    def __init__(self, chat: bool, model: str, tokens: TokenBytes, with_logprobs: bool):
        self.chat, self._model, self._tokens, self._with_logprobs = chat, model, tokens, with_logprobs
        self._id, self._created = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time())

    def whole(self, texts: list[Text], counts: dict) -> dict:
        choices = []
        for index, text in enumerate(texts):
            piece = text.whole()
            message = {"message": {"role": "assistant", "content": piece.text}} if self.chat else {"text": piece.text}
            choices.append(self._choice(index, piece, message, Offsets()))
        return self._body("chat.completion" if self.chat else "text_completion", choices) | {"usage": counts}

    def first_chunk(self, index: int) -> dict:
        """The role of the message that comes. Only for chats."""
        empty = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return self._chunk([empty])

    def chunk(self, index: int, piece: Piece, offsets: Offsets) -> dict:
        """A piece of a choice. offsets: of this choice, the same for all its pieces."""
        delta = {"content": piece.text} if piece.text or piece.finish is None else {}
        return self._chunk(
            [self._choice(index, piece, {"delta": delta} if self.chat else {"text": piece.text}, offsets)]
        )

    def last_chunk(self, counts: dict) -> dict:
        return self._chunk([]) | {"usage": counts}

    def _chunk(self, choices: list[dict]) -> dict:
        return self._body("chat.completion.chunk" if self.chat else "text_completion", choices)

    def _body(self, kind: str, choices: list[dict]) -> dict:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}

    def _choice(self, index: int, piece: Piece, content: dict, offsets: Offsets) -> dict:
        logprobs = None
        if self._with_logprobs:
            logprobs = self._of_chat(piece.tokens) if self.chat else self._of_text(piece.tokens, offsets)
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": piece.finish}

    def _of_chat(self, tokens: tuple[Chosen, ...]) -> dict:
        return {
            "content": [
                {
                    **self._entry(chosen.token, chosen.logprob),
                    "top_logprobs": [self._entry(token, logprob) for token, logprob in chosen.likeliest],
                }
                for chosen in tokens
            ],
            "refusal": None,
        }

    def _entry(self, token: int, logprob: float) -> dict:
        data = self._tokens.of(token)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    def _of_text(self, tokens: tuple[Chosen, ...], offsets: Offsets) -> dict:
        return {
            "tokens": [self._name(chosen.token) for chosen in tokens],
            "token_logprobs": [chosen.logprob for chosen in tokens],
            "top_logprobs": [self._likeliest(chosen) for chosen in tokens],
            "text_offset": [offsets.next(self._tokens.in_text(chosen.token)) for chosen in tokens],
        }

    def _likeliest(self, chosen: Chosen) -> dict[str, float]:
        entries = {}
        for token, logprob in chosen.likeliest:  # the likeliest first, which stays where tokens have the same name
            entries.setdefault(self._name(token), logprob)
        return entries

    def _name(self, token: int) -> str:
        """A token as /v1/completions writes it. Bytes that are no whole characters are written as OpenAI does."""
        data = self._tokens.of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return f"bytes:{repr(data)[2:-1]}"
