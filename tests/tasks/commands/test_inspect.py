"""What `elastic inspect` says of models of other architectures than the command line's own tests have."""

from transformers import LlamaConfig

from elastic_core.cost.metrics import num_parameters
from tasks.commands.inspect import inspect_checkpoint
from tests.support.models.parents import save_random_parent
from tests.support.pipeline.command_line import call


def test_a_llama_is_inspected(tmp_path):
    values = {"hidden_size": 24, "intermediate_size": 19, "num_attention_heads": 6}
    config = LlamaConfig(vocab_size=37, num_hidden_layers=3, num_key_value_heads=2, head_dim=6, **values)
    save_random_parent(tmp_path / "parent", 3, config)
    found = inspect_checkpoint(tmp_path / "parent")
    assert (found["model_type"], found["pattern"], found["parameters"]) == ("llama", "LLL", num_parameters(config))
    assert found["widths"] == values | {"mamba_num_heads": None, "mamba_head_dim": None}
    assert "llama" in call("inspect", tmp_path / "parent")
