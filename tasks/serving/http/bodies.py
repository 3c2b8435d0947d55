"""What clients send: the bodies of OpenAI's interface, as far as a language model can honour them.

A field that would change the answer and is not supported is refused, so that it is not ignored in silence. A field
that is null says nothing: some clients send all that they know.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tasks.serving.sampling import Settings

MOST_LOGPROBS, MOST_STOPS, MOST_CHOICES = 20, 16, 16
Token = Annotated[int, Field(ge=0)]
Tokens = Annotated[list[Token], Field(min_length=1)]
# Names in chat_template_kwargs that are no variables of a template, but arguments of the functions that render it.
ARGUMENTS = {
    *("chat_template", "tokenize", "messages", "conversation", "tokenizer", "where", "continued"),
    *("self", "add_generation_prompt", "continue_final_message"),
}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False


class Body(BaseModel):
    """What both kinds of requests have. The names and meanings are OpenAI's, and those in the last block are ours."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    max_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[Token, Annotated[float, Field(ge=-100, le=100)]] | None = None
    # These do not change the answer.
    user: Any = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    # These are not OpenAI's; its client sends them in `extra_body`. The first three are as in transformers' `generate`.
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    ignore_eos: bool = False
    hand_over: bool = False

    @model_validator(mode="before")
    @classmethod
    def _given(cls, values):
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("got half of a surrogate pair; allowed: Unicode") from None
        return {n: value for n, value in values.items() if value is not None} if isinstance(values, dict) else values

    @field_validator("stop")
    @classmethod
    def _stops(cls, value):
        texts = [] if value is None else [value] if isinstance(value, str) else value
        if len(texts) > MOST_STOPS or not all(texts):
            raise ValueError(f"got {value!r}; allowed: up to {MOST_STOPS} texts that are not empty")
        return texts

    def settings(self, num_logprobs: int | None, choice: int) -> Settings:
        """How the tokens of one of the choices are drawn."""
        return Settings(
            **{name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.logit_bias or {},
            seed=None if self.seed is None else self.seed + choice,
            num_logprobs=num_logprobs,
        )


class Completion(Body):
    """The body of /v1/completions: a text, or several, to go on from."""

    prompt: str | Tokens | list[str] | list[Tokens]
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """All prompts, each a text or token ids."""
        several = isinstance(self.prompt, list) and not (self.prompt and isinstance(self.prompt[0], int))
        return self.prompt if several else [self.prompt]

    @field_validator("prompt")
    @classmethod
    def _not_empty(cls, value):
        if len(value) == 0:
            raise ValueError("got nothing; allowed: a text, token ids, or a list of them")
        return value


class Chat(Body):
    """The body of /v1/chat/completions: messages to answer."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    modalities: list[Literal["text"]] | None = None
    # As in vLLM: variables of the chat template, and whether the last message is to be continued.
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None

    @model_validator(mode="after")
    def _fits_together(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs: true")
        if self.add_generation_prompt is not None and self.add_generation_prompt == self.continue_final_message:
            raise ValueError("add_generation_prompt: allowed: the opposite of continue_final_message, or nothing")
        return self

    @field_validator("messages")
    @classmethod
    def _texts(cls, messages):
        return [message | {"content": _text_of(message)} for message in messages]

    @field_validator("chat_template_kwargs")
    @classmethod
    def _variables(cls, values):
        if taken := ARGUMENTS & (values or {}).keys():
            raise ValueError(f"got {', '.join(sorted(taken))}; allowed: variables of the chat template")
        return values

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def _text_of(message: dict) -> str:
    """The content of a message: a text, or parts that are texts."""
    content, role = message.get("content"), message.get("role")
    if not isinstance(role, str):
        raise ValueError(f"got the role {role!r}; allowed: system, user, assistant, and others of the chat template")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise ValueError("got a content that is no text; allowed: a text, or a list of parts of type text")
    return content
