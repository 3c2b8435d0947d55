"""How the next token of one text is chosen: as transformers' `generate` chooses it for a single row."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from elastic_core.errors import UserError


class NoChoice(UserError):
    """With the settings of a text, the probabilities of the next token are not finite."""


@dataclass(frozen=True)
class Settings:
    """What a request says about the choice of tokens. What it leaves out (None) is as in generation_config.json.

    temperature: 0 always takes the most likely token.
    seed: of the random numbers; without it, every request draws others.
    presence_penalty, frequency_penalty: subtracted from the logit of a token that was generated already, once or for
        every time. logit_bias: added to the logits of these token ids.
    num_logprobs: how many of the most likely tokens are reported with each token; None reports nothing.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    num_logprobs: int | None = None

    def options(self) -> dict:
        """The options of transformers' `generate` with which it chooses the same tokens."""
        names = ("top_p", "top_k", "min_p", "repetition_penalty")
        options = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.temperature is not None:
            options |= (
                {"temperature": self.temperature, "do_sample": True} if self.temperature else {"do_sample": False}
            )
        elif self.top_p is not None and self.top_p < 1:
            options["do_sample"] = True
        return options


@dataclass(frozen=True)
class Chosen:
    """A token and, where they were asked for, its log-probability and the most likely tokens with theirs.

    Log-probabilities are those of the model itself: before temperature, penalties and other settings.
    """

    token: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


class Chooser:
    """Chooses the tokens of one text, one after the other."""

    def __init__(self, model: PreTrainedModel, settings: Settings, prompt: list[int], max_new_tokens: int):
        """`model`: of the budget, with its generation_config. Raises ValueError for what transformers does not take."""
        self.settings, self.ids, self.num_prompt = settings, list(prompt), len(prompt)
        options = {"num_beams": 1, **settings.options()}
        config, _ = model._prepare_generation_config(None, **options)
        model._prepare_special_tokens(config, True, device=model.device)
        config.max_length = len(prompt) + max_new_tokens
        self._processors = model._get_logits_processor(config, len(prompt), device=model.device)
        if settings.presence_penalty or settings.frequency_penalty or settings.logit_bias:
            self._processors.insert(0, _Shifted(settings, len(prompt)))
        self._samples, self._random = config.do_sample, None
        if self._samples:
            self._random = torch.Generator(model.device)
            self._random.manual_seed(settings.seed) if settings.seed is not None else self._random.seed()

    def choose(self, logits: Tensor, likeliest: int) -> Chosen:
        """The next token after logits (V,). `likeliest` is the token with the largest one. Raises NoChoice."""
        token = likeliest
        if self._samples or self._processors:
            scores = logits[None].to(dtype=torch.float32, copy=True)
            scores = self._processors(torch.tensor([self.ids], device=logits.device), scores)
            if self._samples:
                chances = scores.softmax(-1)
                if not math.isfinite(chances.sum().item()):
                    raise NoChoice("the settings are too extreme: they leave no token to choose")
                token = torch.multinomial(chances, 1, generator=self._random).item()
            else:
                token = scores.argmax(-1).item()
        self.ids.append(token)
        number = self.settings.num_logprobs
        if number is None:
            return Chosen(token)
        logprobs = logits.float().log_softmax(-1)
        values, tokens = logprobs.topk(min(number, len(logprobs)))
        return Chosen(token, logprobs[token].item(), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))


class _Shifted(LogitsProcessor):
    """The penalties and biases of OpenAI's interface."""

    def __init__(self, settings: Settings, num_prompt: int):
        self.settings, self.num_prompt = settings, num_prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        shifts = Counter(self.settings.logit_bias)
        for token, times in Counter(input_ids[0, self.num_prompt :].tolist()).items():
            shifts[token] -= self.settings.presence_penalty + times * self.settings.frequency_penalty
        if shifts:
            tokens = torch.tensor(list(shifts), device=scores.device)
            scores[0, tokens] += torch.tensor(list(shifts.values()), device=scores.device)
        return scores
