"""A heterogeneous budget through the stages: its uniform counterpart is extracted, scored and reported."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from elastic_core import Submodel
from elastic_core.cost.metrics import num_parameters
from elastic_core.data.loader import IGNORED_LABEL, TokenData, held_out_batches
from elastic_core.data.token_files import Manifest, Source, SplitWriter
from elastic_core.export import elastic_checkpoint
from elastic_core.search.selection import Member
from elastic_core.search.uniform import uniform_counterpart
from tasks import evaluate, extract
from tasks.evaluation import samples
from tasks.reporting import findings
from tests.support.models.parents import random_elastic
from tests.support.pipeline.command_line import CONFIG, MEMBERS, WORDS
from tests.support.pipeline.stages import run_stage
from tests.support.pipeline.tiny_pipeline import write_params


def test_the_report_says_what_heterogeneous_widths_gain(tmp_path, monkeypatch):
    """The counterpart's score is that of the library's own slice."""
    monkeypatch.chdir(tmp_path)
    model, submodel = random_elastic(5, CONFIG), MEMBERS["uneven"]
    members = {
        "full": Member(1.0, Submodel()),
        "medium": Member(0.6, submodel),
        "small": Member(0.4, MEMBERS["small"]),
    }
    for stage in ("rank", "train_short", "train_extended"):
        directory = tmp_path / "artifacts" / stage / "model"
        model.save_pretrained(directory)
        elastic_checkpoint.write(directory, CONFIG, members, [])
    extract.extract(extract.FAMILY, Submodel(), evaluate.PARENT)
    write_held_out(tmp_path / "artifacts" / "data")
    write_params(tmp_path, tmp_path, extract={"destination": None}, evaluate={"tasks": []})
    for budget in ("medium", "small"):
        run_stage("extract", budget)
        run_stage("evaluate", budget)
    assert not (extract.OUT / "small" / extract.UNIFORM).exists()

    scores = {name: json.loads((evaluate.OUT / f"{name}.json").read_text()) for name in ("medium", "small")}
    zero_shot, uniform = scores["medium"]["zero_shot"], uniform_counterpart(CONFIG, submodel)
    assert zero_shot["uniform"]["num_parameters"] == num_parameters(CONFIG, uniform)
    batches = list(held_out_batches(TokenData(evaluate.DATA), "mine", 64, 4, 512))
    for found, sizes in ((zero_shot, submodel), (zero_shot["uniform"], uniform)):
        with torch.no_grad():
            losses = [
                F.cross_entropy(model(ids, sizes).flatten(0, 1), labels.flatten(), reduction="sum")
                for ids, labels, _ in batches
            ]
        number = sum((labels != IGNORED_LABEL).sum() for _, labels, _ in batches)
        assert found["loss"] == pytest.approx((sum(losses) / number).item(), rel=1e-5)
    # All versions of a budget have one shape: one measurement serves them, and the last version's words are kept.
    versions = scores["medium"].values()
    assert len({json.dumps(values["latency"]) for values in versions}) == 1
    assert [len(values.get("samples", [])) for values in versions] == [0, 0, 1]
    (sample,) = scores["medium"]["extended"]["samples"]
    assert sample["source"] == "mine" and len(sample["prompt"].split()) == samples.PROMPT_TOKENS
    assert len(sample["expected"].split()) == samples.NEW_TOKENS >= len(sample["continuation"].split())
    ids = torch.tensor([[WORDS.index(word) for word in sample["prompt"].split()]])
    with torch.no_grad():
        first = WORDS[model(ids, submodel)[0, -1].argmax()]
    assert (sample["continuation"].split() or ["<end>"])[0] == first
    (text,) = findings.heterogeneous_gains(scores)
    gain = zero_shot["uniform"]["loss"] - zero_shot["loss"]
    assert f"{zero_shot['loss']:.4f}" in text and f"a {'gain' if gain > 0 else 'loss'} of {abs(gain):.4f}" in text


def write_held_out(directory: Path) -> None:
    """One source of random tokens."""
    directory.mkdir()
    manifest = Manifest(CONFIG.vocab_size, 0, 0, "no tokenizer", {})
    writer, rng = SplitWriter(directory, "mine", "held_out", manifest.dtype), np.random.default_rng(0)
    writer.append([rng.integers(1, CONFIG.vocab_size, 600).tolist()], num_bytes=1200)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(directory / "tokenizer")
    manifest.sources["mine"] = Source("split", {"held_out": writer.close()})
    manifest.write(directory)
