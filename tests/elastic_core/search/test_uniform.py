"""The even counterpart of a heterogeneous submodel, against a search among all homogeneous ones of its shape."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import NemotronHConfig

from elastic_core import Submodel
from elastic_core.cost.memory import Memory
from elastic_core.cost.metrics import PARAMETERS, exact_cost, num_parameters
from elastic_core.data.loader import IGNORED_LABEL, TokenData, held_out_batches
from elastic_core.data.token_files import Manifest, Source, SplitWriter
from elastic_core.export import elastic_checkpoint
from elastic_core.model.axes import PER_LAYER
from elastic_core.search.selection import Member
from elastic_core.search.uniform import uniform_counterpart
from tasks import evaluate, extract, report
from tests.support.command_line import CONFIG, MEMBERS
from tests.support.parents import CONFIGS, random_elastic, random_submodel
from tests.support.tiny_pipeline import write_params


@pytest.mark.parametrize("metric", [PARAMETERS, Memory(64)], ids=["parameters", "memory"])
@pytest.mark.parametrize("family, fields", [("nemotron_h", PER_LAYER), ("llama", ("intermediate_size",))])
def test_costs_as_much_as_alike_widths_can(family, fields, metric):
    uneven = 0
    for seed in range(12):
        config = CONFIGS[family](seed)
        submodel = random_submodel(config, seed, fields).resolve(config)
        even = uniform_counterpart(config, submodel, metric)
        assert even.is_homogeneous
        same = [field.name for field in dataclasses.fields(Submodel) if field.name not in PER_LAYER]
        assert [getattr(even, name) for name in same] == [getattr(submodel, name) for name in same]
        if submodel.is_homogeneous:
            assert even == submodel
            continue
        uneven += 1
        target = exact_cost(metric, config, submodel)
        finest = max(
            (name for name in fields if isinstance(getattr(submodel, name), tuple)),
            key=lambda name: len(valid(config, even, name)),
        )
        best = min(
            abs(exact_cost(metric, config, dataclasses.replace(even, **{finest: size})) - target)
            for size in valid(config, even, finest)
        )
        assert abs(exact_cost(metric, config, even) - target) == best
    assert uneven >= 4


def valid(config, submodel: Submodel, name: str) -> list[int]:
    """The sizes that one width may have."""
    found = []
    for size in range(1, getattr(config, name) + 1):
        try:
            dataclasses.replace(submodel, **{name: size}).resolve(config)
        except ValueError:
            continue
        found.append(size)
    return found


def test_means_of_alike_layers_cost_exactly_as_much():
    config = NemotronHConfig(
        **{"vocab_size": 64, "hidden_size": 32, "layers_block_type": ["mamba", "mlp", "mamba", "mlp", "mamba"]},
        **{"intermediate_size": 64, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8},
    )
    uneven = Submodel(kept_layers=(0, 1, 2, 3), mamba_num_heads=(8, 4, 2), intermediate_size=(64, 32))
    even = uniform_counterpart(config, uneven)  # the last layer is dropped, and does not count
    assert (even.mamba_num_heads, even.intermediate_size) == (6, 48)
    assert num_parameters(config, even) == num_parameters(config, uneven)


def test_the_report_knows_what_uneven_widths_gain(tmp_path, monkeypatch):
    """Through the stages: the counterpart is extracted, scored as the library's own slice scores, and told of."""
    monkeypatch.chdir(tmp_path)
    model, uneven = random_elastic(5, CONFIG), MEMBERS["uneven"]
    members = {"full": Member(1.0, Submodel()), "medium": Member(0.6, uneven), "small": Member(0.4, MEMBERS["small"])}
    for stage in ("rank", "train_short", "train_extended"):
        directory = tmp_path / "artifacts" / stage / "model"
        model.save_pretrained(directory)
        elastic_checkpoint.write(directory, CONFIG, members, [])
    extract.extract(extract.FAMILY, Submodel(), evaluate.PARENT)
    write_held_out(tmp_path / "artifacts" / "data")
    write_params(tmp_path, tmp_path, extract={"destination": None}, evaluate={"tasks": []})
    for budget in ("medium", "small"):
        monkeypatch.setattr(sys, "argv", ["stage", budget])
        extract.main()
        evaluate.main()
    assert not (extract.OUT / "small" / "even").exists()

    scores = {name: json.loads((evaluate.OUT / f"{name}.json").read_text()) for name in ("medium", "small")}
    zero_shot, even = scores["medium"]["zero_shot"], uniform_counterpart(CONFIG, uneven)
    assert zero_shot["even"]["num_parameters"] == num_parameters(CONFIG, even)
    batches = list(held_out_batches(TokenData(evaluate.DATA), "mine", 64, 4, 512))
    for found, submodel in ((zero_shot, uneven), (zero_shot["even"], even)):
        with torch.no_grad():
            losses = [
                F.cross_entropy(model(ids, submodel).flatten(0, 1), labels.flatten(), reduction="sum")
                for ids, labels in batches
            ]
        number = sum((labels != IGNORED_LABEL).sum() for _, labels in batches)
        assert found["loss"] == pytest.approx((sum(losses) / number).item(), rel=1e-5)
    (text,) = report.uneven(scores)
    gain = zero_shot["even"]["loss"] - zero_shot["loss"]
    assert f"{zero_shot['loss']:.4f}" in text and f"a {'gain' if gain > 0 else 'loss'} of {abs(gain):.4f}" in text


def write_held_out(directory: Path) -> None:
    """One source of random tokens."""
    directory.mkdir()
    manifest = Manifest(CONFIG.vocab_size, 0, 0, "no tokenizer", {})
    writer, rng = SplitWriter(directory, "mine", "held_out", manifest.dtype), np.random.default_rng(0)
    writer.append([rng.integers(1, CONFIG.vocab_size, 600).tolist()], num_bytes=1200)
    manifest.sources["mine"] = Source(False, {"held_out": writer.close()})
    manifest.write(directory)
