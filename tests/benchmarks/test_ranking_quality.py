"""The benchmarks of rankings and of slices: magnitudes against loops, sizes against budgets, tables on a small run."""

import collections
import math

import numpy as np
import pytest
import torch
import yaml

from benchmarks import ranking_quality, slices
from elastic_core import ElasticModel, Submodel, rank, sort_
from elastic_core.cost.metrics import num_parameters
from elastic_core.data.loader import TokenData, held_out_batches
from elastic_core.data.token_files import Manifest, Source, SplitWriter
from elastic_core.model import architectures
from elastic_core.search.choices import Choices
from elastic_core.search.space import ElasticSpace
from tasks.settings.load import load
from tests.support.models.parents import CONFIGS, random_config, random_elastic, random_llama_config, save_random_parent
from tests.support.models.real_parents import ROOT


@pytest.mark.parametrize("seed", range(3))
def test_magnitudes_of_units_are_those_of_their_rows(seed):
    """Heads by hand; neurons and hidden channels by zeroing them and asking what the norm of all weights lost."""
    config = random_llama_config(seed)
    parameters = dict(random_elastic(seed, config).named_parameters())
    layout = architectures.parameter_layout(config)
    found = ranking_quality.weight_magnitudes(parameters, layout)
    layer = {name.removeprefix("model.layers.0."): p for name, p in parameters.items() if ".layers.0." in name}
    size = architectures.of(config).head_dim(config)
    for head in range(config.num_attention_heads):
        rows = slice(head * size, (head + 1) * size)
        parts = [layer["self_attn.q_proj.weight"][rows], layer["self_attn.o_proj.weight"][:, rows]]
        if "self_attn.q_proj.bias" in layer:
            parts.append(layer["self_attn.q_proj.bias"][rows])
        expected = math.sqrt(sum(part.double().square().sum().item() for part in parts))
        assert found["attention_heads.0"][head].item() == pytest.approx(expected, rel=1e-12)
    hidden = math.sqrt(
        sum(
            p.double().movedim(axis, 0)[0].square().sum().item()
            for name, p in parameters.items()
            for axis, dim in enumerate(layout[name])
            if getattr(dim, "key", None) == "hidden"
        )
    )
    assert found["hidden"][0].item() == pytest.approx(hidden, rel=1e-12)


@pytest.mark.parametrize("target", [0.8, 0.5])
def test_widths_are_reduced_in_proportion_to_the_budget(target):
    config = random_config(3)
    widths = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "mamba_head_dim": config.mamba_head_dim,
    }
    choices = Choices(**{name: tuple(range(size, size // 4, -1)) for name, size in widths.items()})
    order = tuple(range(len(config.layers_block_type)))
    submodel = ranking_quality.proportional_widths(ElasticSpace(config, choices, order), target)
    assert abs(num_parameters(config, submodel) / num_parameters(config) / target - 1) <= 0.02
    assert submodel.kept_layers == order
    kept = [getattr(submodel, name) / size for name, size in widths.items()]
    assert max(kept) - min(kept) < 0.2 and max(kept) < 1


def make_workspace(directory, architecture: str):
    """What the stages prepare_data and parent leave: tokens at random, and a random parent."""
    config = CONFIGS[architecture](11)
    save_random_parent(directory / "artifacts/parent", 11, config)
    (directory / "artifacts/parent/tokenizer.json").write_text("{}")
    data, draw = directory / "artifacts/data", np.random.default_rng(0)
    data.mkdir()
    manifest = Manifest(config.vocab_size, 0, 0, "no tokenizer", {})
    splits = {}
    for split in ("train", "held_out"):
        writer = SplitWriter(data, "text", split, manifest.dtype)
        writer.append([draw.integers(1, config.vocab_size, 400).tolist()], num_bytes=800)
        splits[split] = writer.close()
    manifest.sources["text"] = Source("split", splits)
    manifest.write(data)
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["prepare_data"]["sources"] = {"text": {"kind": "files", "path": "text.txt"}}
    values["parent"]["path"] = str(directory / "artifacts/parent")
    for name in ("rank", "train_short", "train_extended"):
        values[name]["mixture"] = {"text": 1.0}
    values["parent"]["training"] = None
    values["rank"] |= {"batches": 2, "batch_size": 2, "sequence_length": 16, "depth_batches": 1}
    values["evaluate"] |= {"held_out": ["text"], "max_tokens": 64, "sequence_length": 16, "tasks": []}
    values["budgets"] = {"full": 1.0, "small": f"{0.6 * num_parameters(config):.0f}"}  # as a count
    for name in ("train_short", "train_extended"):
        values[name]["budget_shares"] = {"full": 0.5, "small": 0.5}
    heads = config.num_attention_heads
    sizes = range(config.hidden_size, 0, -heads if architecture == "llama" else -1)
    values["choices"] = {
        "hidden_size": list(sizes),
        "intermediate_size": list(range(config.intermediate_size, 0, -1)),
        "depth": list(range(architectures.num_layers(config), 0, -1)),
    }
    (directory / "params.yaml").write_text(yaml.safe_dump(values))
    return directory


@pytest.mark.parametrize("architecture", CONFIGS)
def test_one_table_for_any_architecture(tmp_path, architecture, monkeypatch, capsys):
    workspace = make_workspace(tmp_path / "run", architecture)
    arguments = [str(workspace), "--parts", *ranking_quality.PARTS, "--steps", "2", "--seeds", "2"]
    monkeypatch.setattr("sys.argv", ["ranking_quality", *arguments])
    ranking_quality.main()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == list(ranking_quality.HEADINGS) and {len(row) for row in rows} == {6}
    names = ["importance (projection, l1)", "importance (output_norm, l2)", "weight magnitude", "random"]
    assert [row[2] for row in rows[2:4]] == ["none", "token frequencies"]
    reduced = {}
    for row in rows[4:]:
        reduced.setdefault(row[2], []).append(row)
    assert [row[3] for row in reduced.pop("widths")] == names
    distilled = reduced.pop("widths, 2 steps")
    assert [row[3] for row in distilled] == names and {row[5] for row in distilled}.isdisjoint(r[5] for r in rows[4:8])
    assert all(abs(float(row[4]) / 0.6 - 1) <= 0.02 for row in rows[4:8])
    (depth,) = (reduced.pop(what) for what in list(reduced) if what.startswith("depth"))
    assert [row[3].split(",")[0] for row in depth] == list(ranking_quality.METHODS)
    assert {what.split()[0] for what in reduced} >= {"hidden_size", "intermediate_size"}
    for axis in reduced.values():
        assert [row[3] for row in axis] == names and float(axis[0][4]) >= float(rows[4][4])
    # The parent's own number, computed from whole logits.
    data, model = TokenData(workspace / "artifacts/data"), ElasticModel.from_pretrained(workspace / "artifacts/parent")
    section = load(workspace / "params.yaml").evaluate
    nats, num_bytes, held_out = 0.0, 0.0, []
    for ids, labels, _ in held_out_batches(data, "text", 16, section.batch_size, 64):
        with torch.no_grad():
            logprobs = model(ids).log_softmax(-1)
        nats -= logprobs.gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels >= 0].sum().item()
        held_out += labels[labels >= 0].tolist()
        num_bytes += int((labels >= 0).sum()) * data.bytes_per_token("text", "held_out")
    assert float(rows[2][5]) == pytest.approx(nats / math.log(2) / num_bytes, abs=1e-4)
    # And what guessing by frequency makes of the same text.
    counts = collections.Counter(data.tokens("text", "train").tolist())
    total = sum(counts.values()) + data.manifest.vocab_size
    found = sum(-math.log((counts[token] + 1) / total) for token in held_out)
    assert float(rows[3][5]) == pytest.approx(found / math.log(2) / num_bytes, abs=1e-4)


def test_given_slices_of_a_sorted_model(tmp_path, monkeypatch, capsys):
    """The losses are those of whole logits, and the layers are the most important ones."""
    workspace = make_workspace(tmp_path / "run", "llama")
    config = CONFIGS["llama"](11)
    model, batches = ElasticModel.from_pretrained(workspace / "artifacts/parent").eval(), [torch.arange(1, 17)[None]]
    ranking = rank(model, batches, basis="channels", depth_method="one_shot_nmse")
    ranking.save(workspace / "artifacts/rank/ranking.json")
    sort_(model, ranking).save_pretrained(workspace / "artifacts/rank/model")
    given = [(config.hidden_size, config.intermediate_size, 2), (config.num_attention_heads, 5, 1)]
    monkeypatch.setattr("sys.argv", ["slices", str(workspace), *(",".join(map(str, sizes)) for sizes in given)])
    slices.main()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == list(slices.HEADINGS) and [tuple(map(int, row[:3])) for row in rows[2:]] == given
    data, section = TokenData(workspace / "artifacts/data"), load(workspace / "params.yaml").evaluate
    for (hidden, ffn, layers), row in zip(given, rows[2:], strict=True):
        submodel = Submodel(hidden_size=hidden, intermediate_size=ffn, kept_layers=sorted(ranking.depth[:layers]))
        assert row[3] == f"{num_parameters(config, submodel):,}"
        nats, num_bytes = 0.0, 0.0
        for ids, labels, _ in held_out_batches(data, "text", 16, section.batch_size, 64):
            with torch.no_grad():
                losses = torch.nn.functional.cross_entropy(model(ids, submodel).flatten(0, 1), labels.flatten())
            nats += losses.item() * int((labels >= 0).sum())
            num_bytes += int((labels >= 0).sum()) * data.bytes_per_token("text", "held_out")
        assert float(row[4]) == pytest.approx(nats / math.log(2) / num_bytes, abs=1e-4)
