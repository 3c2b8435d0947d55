"""Benchmarks through lm-eval: scores against the model's own probabilities, and what is refused before a run."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerFast

from elastic_core.config import ConfigError, load
from tasks.evaluation.lm_eval_tasks import benchmark_scores
from tasks.settings.local_checks import check_benchmarks
from tasks.settings.sections import Benchmarks
from tests.support.models.letters import CHOICE, ITEMS, LAST, write_letters
from tests.support.models.tiny_reasoner import tiny_model


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with items, task files in another one, and data with a tokenizer of letters."""
    monkeypatch.chdir(tmp_path)
    write_letters(tmp_path)
    group = {"group": "both", "task": ["letters"], "aggregate_metric_list": [{"metric": "acc"}]}
    for name, task in (("letters", CHOICE), ("last", LAST), ("both", group)):
        (tmp_path / "files" / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


@torch.no_grad()
def log_likelihood(model, tokenizer, question: str, answer: str) -> float:
    ids = tokenizer(question + answer, return_tensors="pt").input_ids
    logprobs = model(ids, use_cache=False).logits[0].log_softmax(-1)
    return sum(logprobs[i - 1, ids[0, i]].item() for i in range(len(question), ids.shape[1]))


def test_scores_are_those_of_the_models_own_probabilities(here):
    data = SimpleNamespace(directory=Path("data"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(here / "data/tokenizer")
    model = tiny_model(tokenizer)
    section = Benchmarks(("letters", "last"), include="files", data_root="root", batch_size=3)
    scores = benchmark_scores(section, data, model)
    likely = [
        [log_likelihood(model, tokenizer, item["question"], choice) for choice in item["choices"]] for item in ITEMS
    ]
    hits = {"acc": [], "acc_norm": []}
    for item, values in zip(ITEMS, likely, strict=True):
        each = [value / len(choice) for value, choice in zip(values, item["choices"], strict=True)]
        hits["acc"].append(values.index(max(values)) == item["label"])
        hits["acc_norm"].append(each.index(max(each)) == item["label"])
    means = {name: sum(found) / len(ITEMS) for name, found in hits.items()}
    letters = scores["letters"]
    assert (letters["metric"], letters["items"], letters["value"]) == ("acc_norm", 4, means["acc_norm"])
    assert letters["all"]["acc,none"] == means["acc"]
    p = means["acc_norm"]
    assert letters["standard_error"] == pytest.approx(math.sqrt(p * (1 - p) / 3))
    of_labels = [values[item["label"]] for item, values in zip(ITEMS, likely, strict=True)]
    last = scores["last"]
    assert last["metric"] == "perplexity" and last["value"] == pytest.approx(math.exp(-sum(of_labels) / 4), rel=1e-4)
    assert last["standard_error"] > 0  # resampled
    first = benchmark_scores(Benchmarks(("letters",), "files", "root", limit=2), data, model)["letters"]
    assert first["items"] == 2 and first["value"] == sum(hits["acc_norm"][:2]) / 2
    group = benchmark_scores(Benchmarks(("both",), "files", "root"), data, model)["both"]
    assert (group["metric"], group["items"], group["value"]) == ("acc", 4, means["acc"])
    json.dumps(scores)


def test_no_benchmarks():
    assert benchmark_scores(None, None, None) == {}


@pytest.mark.parametrize(
    "values, message",
    [
        ({"tasks": []}, r"here\.tasks: got \(\); allowed: one or more; or benchmarks: null"),
        ({"tasks": ["letters", "letters"]}, r"here\.tasks: got .*; allowed: every task once"),
        ({"tasks": ["letters"], "limit": 0}, r"here\.limit: got 0; allowed: 1 or more, or null"),
        ({"tasks": ["letters"], "batch_size": 0}, r"here\.batch_size: got 0"),
        ({"tasks": ["letters"], "num_fewshot": -1}, r"here\.num_fewshot: got -1"),
        (
            {"tasks": ["letters"], "include": "nowhere"},
            r"here\.include: got 'nowhere'; allowed: a directory of lm-eval",
        ),
        ({"tasks": ["letters"], "data_root": "nowhere"}, r"here\.data_root: got 'nowhere'; allowed: a directory"),
        (
            {"tasks": ["words"], "include": "files"},
            r"here\.tasks: got 'words'; allowed: both, last, letters \(files in",
        ),
    ],
)
def test_refusals(here, values, message):
    with pytest.raises(ConfigError, match=message):
        check_benchmarks(load(Benchmarks, values, "here"), "here")
