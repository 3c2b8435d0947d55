"""From the body of a request to jobs for the engine, or to an error in OpenAI's form."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from elastic_core.errors import UserError
from tasks.serving.engine import Engine
from tasks.serving.family import Budget, Family
from tasks.serving.http.bodies import Chat, Completion
from tasks.serving.http.token_bytes import TokenBytes
from tasks.serving.jobs import Job
from tasks.serving.metrics import Metrics
from tasks.serving.sampling import Chooser

DEFAULT_COMPLETION = 16  # new tokens where a completion says nothing, as in OpenAI's interface


class Refused(Exception):
    """A request ends with an error in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status = status
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass
class Service:
    """What the routes work with. `timeout`: seconds for a request, from its arrival to the end of its answer."""

    family: Family
    engine: Engine
    metrics: Metrics
    timeout: float
    started: int = field(default_factory=lambda: int(time.time()))
    tokens: TokenBytes = field(init=False)

    def __post_init__(self):
        self.tokens = TokenBytes(self.family.tokenizer)

    def budget(self, name: str) -> Budget:
        try:
            return self.family.budget(name)
        except UserError as error:
            raise Refused(404, str(error), "model_not_found", "model") from None

    def prepare(self, body: Chat | Completion) -> list[Job]:
        """The jobs of a request, one for every choice; their `emit` is to be set. Raises Refused."""
        budget, deadline = self.budget(body.model), time.monotonic() + self.timeout
        self._check_number(body)
        jobs = []
        for prompt in self._prompts(body):
            num_new = self._num_new(body, budget, len(prompt))
            for choice in range(body.n):
                try:
                    settings = body.settings(body.num_logprobs, choice)
                    if settings.logit_bias and max(settings.logit_bias) >= self.family.config.vocab_size:
                        raise UserError(f"logit_bias: allowed: token ids below {self.family.config.vocab_size}")
                    chooser = Chooser(budget.model, settings, prompt, num_new)
                except ValueError as error:  # of ours, and of transformers for values that it does not take
                    raise Refused(400, str(error)) from None
                stop_ids = frozenset() if body.ignore_eos else self.family.stop_ids()
                stop = tuple(body.stop or ())
                jobs.append(Job(budget, chooser, num_new, None, stop, stop_ids, body.hand_over, deadline))
        return jobs

    def _check_number(self, body: Chat | Completion) -> None:
        """Raise Refused for more texts than the queue ever has places for: to try later would not help."""
        num_prompts, most = 1 if isinstance(body, Chat) else len(body.prompts), self.engine.limits.max_waiting
        if num_prompts * body.n > most:
            given = f"{body.n} choices" if num_prompts == 1 else f"{num_prompts} prompts with {body.n} choices each"
            param = "n" if num_prompts == 1 else "prompt"
            raise Refused(400, f"{param}: got {given}; allowed: {most} in all (--max-waiting)", param=param)

    def _prompts(self, body: Chat | Completion) -> list[list[int]]:
        try:
            if isinstance(body, Chat):
                options = body.chat_template_kwargs or {}
                prompts = [self.family.chat_tokens(body.messages, body.continue_final_message, **options)]
            else:
                prompts = [self.family.tokens(one) if isinstance(one, str) else one for one in body.prompts]
        except UserError as error:
            raise Refused(400, str(error), param="messages" if isinstance(body, Chat) else "prompt") from None
        size = self.family.config.vocab_size
        if any(not prompt or max(prompt) >= size for prompt in prompts):
            raise Refused(400, f"prompt: allowed: at least one token, and token ids below {size}", param="prompt")
        return prompts

    def _num_new(self, body: Chat | Completion, budget: Budget, num_prompt: int) -> int:
        """The largest number of new tokens."""
        asked, left = body.max_tokens, self.engine.limits.context - num_prompt
        if isinstance(body, Chat):
            asked = body.max_completion_tokens or asked
        if left < (asked or 1):
            raise Refused(
                400,
                f"got {num_prompt} tokens of the prompt and {asked or 1} new ones; allowed: "
                f"{self.engine.limits.context} in all",
                "context_length_exceeded",
            )
        own = budget.model.generation_config.max_new_tokens
        own = own or (left if isinstance(body, Chat) else DEFAULT_COMPLETION)
        return min(left, asked or own)
