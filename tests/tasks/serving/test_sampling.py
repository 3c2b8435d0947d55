"""Tokens are chosen as transformers' `generate` chooses them, and with OpenAI's penalties."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from tasks.serving.sampling import Chooser, Settings
from tests.support.models.parents import random_reference
from tests.support.models.served_family import served_config

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def model():
    model = random_reference(1, served_config("llama", 64))
    model.generation_config.repetition_penalty, model.generation_config.suppress_tokens = 1.3, [7, 8]
    return model


def tokens(model, settings: Settings, number: int = 12) -> list[int]:
    chooser = Chooser(model, settings, PROMPT, number)
    with torch.no_grad():
        for _ in range(number):
            logits = model(torch.tensor([chooser.ids])).logits[0, -1]
            chooser.choose(logits, logits.argmax().item())
    return chooser.ids[len(PROMPT) :]


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(temperature=0),
        Settings(temperature=0.7, seed=11),
        Settings(temperature=3.0, top_p=0.8, top_k=0, seed=5),
        Settings(top_p=0.9, top_k=20, min_p=0.01, repetition_penalty=1.0, seed=7),
    ],
)
def test_the_tokens_are_those_of_generate(model, settings):
    """With the same seed also the drawn ones. Values of generation_config.json count where the request has none."""
    torch.manual_seed(0 if settings.seed is None else settings.seed)
    ids = torch.tensor([PROMPT])
    options = settings.options() | {"max_new_tokens": 12, "eos_token_id": None}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(PROMPT) :].tolist()
    assert tokens(model, settings) == expected
    assert not {7, 8} & set(expected)


def test_seeds(model):
    hot = {"temperature": 5.0, "top_k": 0}
    assert tokens(model, Settings(seed=1, **hot)) == tokens(model, Settings(seed=1, **hot))
    drawn = [tokens(model, Settings(**hot)) for _ in range(3)] + [tokens(model, Settings(seed=1, **hot))]
    assert len(set(map(tuple, drawn))) == 4


class Penalties(LogitsProcessor):
    """The formula of OpenAI's documentation: mu[j] - c[j] * alpha_frequency - (c[j] > 0) * alpha_presence."""

    def __call__(self, ids, scores):
        for j in range(scores.shape[1]):
            c = (ids[0, len(PROMPT) :] == j).sum()
            scores[0, j] = scores[0, j] - c * 0.5 - float(c > 0) * 1.5 + (3.0 if j == 12 else 0.0)
        return scores


def test_penalties_and_biases(model):
    plain = random_reference(1, served_config("llama", 64))
    settings = Settings(presence_penalty=1.5, frequency_penalty=0.5, logit_bias={12: 3.0})
    ids, own = torch.tensor([PROMPT]), LogitsProcessorList([Penalties()])
    options = {
        "max_new_tokens": 12,
        "eos_token_id": None,
        "logits_processor": own,
        "attention_mask": torch.ones_like(ids),
    }
    found = tokens(plain, settings)
    assert found == plain.generate(ids, **options)[0, len(PROMPT) :].tolist()
    assert found != tokens(plain, Settings())


def test_log_probabilities_are_the_models_own(model):
    logits = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 3
    chooser = Chooser(model, Settings(temperature=9.0, seed=0, num_logprobs=3), PROMPT, 4)
    chosen, expected = chooser.choose(logits, logits.argmax().item()), logits.log_softmax(-1)
    assert chosen.logprob == pytest.approx(expected[chosen.token].item())
    assert [token for token, _ in chosen.likeliest] == expected.topk(3).indices.tolist()
    assert Chooser(model, Settings(num_logprobs=0), PROMPT, 4).choose(logits, 5).likeliest == ()
    assert Chooser(model, Settings(), PROMPT, 4).choose(logits, 5).logprob is None


def test_values_that_transformers_does_not_take(model):
    with pytest.raises(ValueError, match="penalty"):
        Chooser(model, Settings(repetition_penalty=-1.0), PROMPT, 4)
