"""What `elastic inspect` says of models of other architectures than the command line's own tests have."""

from transformers import LlamaConfig

from elastic_core import ElasticModel, Submodel
from elastic_core.cost.metrics import num_parameters
from elastic_core.export import elastic_checkpoint
from elastic_core.model.norm_gains import BudgetGains
from elastic_core.search.selection import Member
from tasks.commands.inspect import inspect_checkpoint
from tests.support.models.parents import random_llama_config, random_ratios, save_random_parent
from tests.support.pipeline.command_line import call


def test_a_llama_is_inspected(tmp_path):
    values = {"hidden_size": 24, "intermediate_size": 19, "num_attention_heads": 6}
    config = LlamaConfig(vocab_size=37, num_hidden_layers=3, num_key_value_heads=2, head_dim=6, **values)
    save_random_parent(tmp_path / "parent", 3, config)
    found = inspect_checkpoint(tmp_path / "parent")
    assert (found["model_type"], found["pattern"], found["parameters"]) == ("llama", "LLL", num_parameters(config))
    assert found["widths"] == values | {"mamba_num_heads": None, "mamba_head_dim": None}
    assert "llama" in call("inspect", tmp_path / "parent")


def test_gains_of_norms_are_named(tmp_path):
    save_random_parent(tmp_path / "parent", 3, random_llama_config(3))
    model = ElasticModel.from_pretrained(tmp_path / "parent")
    assert inspect_checkpoint(tmp_path / "parent")["norm_gains"] is None
    model.norm_gains = random_ratios(model.config)
    model.save_pretrained(tmp_path / "sorted")
    assert inspect_checkpoint(tmp_path / "sorted")["norm_gains"] == "ratios"
    small = Submodel(intermediate_size=3).resolve(model.config)
    gains = {name: model.get_parameter(name) for name in model.norm_gains.ratios}
    model.norm_gains = BudgetGains({"small": small}, {"small": gains})
    model.save_pretrained(tmp_path / "family")
    members = {"full": Member(1.0, model.full), "small": Member(0.5, small)}
    elastic_checkpoint.write(tmp_path / "family", model.config, members, [], private_norms=True)
    assert inspect_checkpoint(tmp_path / "family")["norm_gains"] == "budgets"
    assert "every budget has gains of its own" in call("inspect", tmp_path / "family")
    assert "gains of" not in call("inspect", tmp_path / "parent")
