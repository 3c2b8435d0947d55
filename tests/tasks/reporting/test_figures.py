"""Charts and captions of the report, for parents whose layers have several axes and for stages with several losses."""

import json
from collections import Counter
from types import SimpleNamespace

import pandas as pd
import pytest
from transformers import LlamaConfig

from elastic_core.training.stage import Loss, Stage
from tasks.reporting import charts, figures, tables, vega
from tests.support.models.moe_family import CONFIG as MOE
from tests.support.models.routed_family import CONFIG as HYBRID

LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=48,
    num_attention_heads=6,
    num_key_value_heads=2,
    num_hidden_layers=3,
    intermediate_size=96,
    head_dim=8,
)
SMALL = {
    "llama": (LLAMA, {"kept_layers": (0, 1), "intermediate_size": (48, 24, 96), "num_attention_heads": 4}),
    "experts": (MOE, {"kept_layers": (0, 1, 2), "num_experts": 4, "moe_intermediate_size": 8}),
    "hybrid": (HYBRID, {"hidden_size": 16}),
}


def kept_table(name: str):
    config, small = SMALL[name]
    members = {"full": {}, "small": small}
    scores = {budget: {tables.FINAL: {"submodel": fields}} for budget, fields in members.items()}
    return tables.router({"parent": {}} | scores, config)


def heat_maps(chart: dict) -> list[list[dict]]:
    """The cells of every heat map in a chart."""
    if "layer" in chart:
        return [chart["data"]["values"]]
    return [cells for part in chart.get("hconcat", chart.get("vconcat")) for cells in heat_maps(part)]


@pytest.mark.parametrize("name", SMALL)
def test_every_kept_size_has_a_cell_of_its_own(name):
    frame = kept_table(name)
    figure = charts.Figure("sizes", "", charts.kept_sizes(frame))
    maps = heat_maps(json.loads(figure.spec(charts.LIGHT)))
    for cells in maps:
        assert max(Counter((cell["budget"], cell["column"]) for cell in cells).values()) == 1
    drawn = Counter((cell["budget"], cell["axis"], cell["layer"]) for cells in maps[1:] for cell in cells)
    whole = frame["axis"].isin(["hidden_size", "mamba_head_dim"])
    assert drawn == Counter(frame[~whole][["budget", "axis", "layer"]].itertuples(index=False, name=None))


def test_the_panels_of_layers_with_several_axes_are_named():
    svg = vega.to_svg(charts.Figure("sizes", "", charts.kept_sizes(kept_table("llama"))).spec(charts.LIGHT))
    assert all(f">{text}<" in svg for text in ("MLP", "attention heads", "0 L", "24", "4"))
    assert svg.count(">×<") == 2 and svg.count(">small<") == 3  # per panel; beside the whole model's sizes too


def test_the_caption_of_kept_sizes_names_the_axes_of_the_parent():
    llama, experts, hybrid = (figures.kept_caption(kept_table(name)) for name in SMALL)
    assert "a panel per axis" in llama and "neurons of an MLP (L), query heads of an attention layer (L)" in llama
    assert "Mamba" not in llama
    assert "routed experts of a layer (E)" in experts and "neurons of the shared expert (E)" in experts
    assert "channels per Mamba head of the whole model" in hybrid and "panel" not in hybrid


def test_the_caption_of_training_names_the_losses_of_all_budgets():
    mixed = Stage(64, 4, 10, 1e-3, loss_by_budget={"full": Loss(1.0, 0.0), "small": Loss(0.5, 2.0)})
    stages = {"train_short": mixed, "train_extended": Stage(64, 4, 10, 1e-3, loss=Loss(0.0, 1.0))}
    settings = SimpleNamespace(parent=SimpleNamespace(training=None), **stages)
    rows = [{"stage": stage, "ce": 1.0, "kl": 1.0, "budget": "full", "tokens": 1} for stage in stages]
    drawn = figures.training_figures(settings, pd.DataFrame(rows), None, ["full"])
    captions = {figure.title: figure.caption.partition(" The loss is ")[2] for figure in drawn}
    own = "; of full: 1 × cross-entropy; of small: 0.5 × cross-entropy + 2 × KL."
    assert captions["Stage 1: cross-entropy with the text"] == captions["Stage 1: KL to the teacher"] == "1 × KL" + own
    assert captions["Stage 2: KL to the teacher"] == "1 × KL."
