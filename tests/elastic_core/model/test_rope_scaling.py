"""Scaled rotary positions: those of transformers, in the model, in the files and beyond the parent's own length."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from elastic_core import ElasticModel, Submodel, extract
from elastic_core.config import ConfigError
from elastic_core.errors import UserError
from elastic_core.model import architectures, hf
from elastic_core.model.rope_scaling import check_rope_scaling
from tests.support.models.parents import (
    random_config,
    random_elastic,
    random_ids,
    random_reference,
    relative_error,
    save_random_parent,
)

SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "yarn from a shorter text": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8},
    "yarn, all options": {
        **{"rope_type": "yarn", "factor": 4, "beta_fast": 16, "beta_slow": 2.0, "truncate": False},
        **{"attention_factor": 0.9, "original_max_position_embeddings": 16},
    },
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
SIZES = {
    **{"vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": 20, "max_position_embeddings": 16, "eos_token_id": None, "bos_token_id": None},
}
OWN = {"rope_type": "default", "rope_theta": 500.0}


def parent_config(kind, rope=OWN):
    heads = {} if kind is Qwen2Config else {"head_dim": 8}
    return kind(**SIZES, **heads, rope_parameters=dict(rope))


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("name", SCALINGS)
def test_logits_and_files_are_those_of_transformers(tmp_path, kind, name):
    """transformers reads the scaling from config.json as its users write it, and again from what is written here."""
    scaling = SCALINGS[name]
    check_rope_scaling(scaling)
    save_random_parent(tmp_path / "own", 3, parent_config(kind))
    config = architectures.with_rope_scaling(hf.read_config(tmp_path / "own"), scaling)
    model = ElasticModel.from_pretrained(tmp_path / "own", config=config)
    model.save_pretrained(tmp_path / "scaled")
    extract(tmp_path / "scaled", Submodel(intermediate_size=10), tmp_path / "small")
    values = json.loads((tmp_path / "own" / "config.json").read_text())
    values["rope_scaling"] = {"original_max_position_embeddings": 16, **scaling}
    values |= {"rope_theta": 500.0, "rope_parameters": None, "max_position_embeddings": 64}
    (tmp_path / "own" / "config.json").write_text(json.dumps(values))
    ids = random_ids(config, 0, (2, 64))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "own")(ids).logits
        assert relative_error(model(ids), expected) < 1e-5
        written = AutoModelForCausalLM.from_pretrained(tmp_path / "scaled")
        assert relative_error(written(ids).logits, expected) < 1e-6
        small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
        assert relative_error(model(ids, Submodel(intermediate_size=10)), small(ids).logits) < 1e-5
        unscaled = ElasticModel.from_pretrained(tmp_path / "scaled", config=parent_config(kind))(ids)
        assert relative_error(unscaled, expected) > 1e-3  # so the scaling can be seen
    for found in (config, written.config, small.config, hf.read_config(tmp_path / "small")):
        assert found.max_position_embeddings == 64
        assert found.rope_parameters["rope_theta"] == 500.0
        assert scaling.items() <= found.rope_parameters.items()


def test_the_length_without_scaling_is_where_a_new_scaling_starts():
    def scaled(own, scaling, kind=LlamaConfig):
        found = architectures.with_rope_scaling(parent_config(kind, own), scaling)
        return found.max_position_embeddings, found.rope_parameters.get("original_max_position_embeddings")

    yarn = {"rope_type": "yarn", "factor": 4.0}
    assert scaled(OWN, yarn) == (64, 16)
    assert scaled(OWN, yarn | {"original_max_position_embeddings": 32}) == (128, 32)
    assert scaled({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, yarn) == (32, 8)
    assert scaled({**yarn, "rope_theta": 1e4, "original_max_position_embeddings": 4}, yarn) == (16, 4)
    assert scaled(OWN, {"rope_type": "linear", "factor": 2.5}) == (40, None)
    config = parent_config(LlamaConfig)
    assert architectures.with_rope_scaling(config, None) is config
    architectures.with_rope_scaling(config, yarn)
    assert config.max_position_embeddings == 16 and config.rope_parameters == OWN


def test_an_architecture_without_rotary_positions_has_no_limit_and_takes_no_scaling():
    """transformers' forward of nemotron_h does not depend on max_position_embeddings, and neither does ours."""
    config, ids, logits = random_config(1), random_ids(random_config(1), 0), []
    for config.max_position_embeddings in (4, 4096):
        logits += [random_reference(1, config)(ids, use_cache=False).logits, random_elastic(1, config)(ids)]
    assert torch.equal(logits[0], logits[2]) and torch.equal(logits[1], logits[3])
    assert architectures.max_positions(config) is None
    with pytest.raises(UserError, match="rope_scaling: a nemotron_h has no rotary positions"):
        architectures.with_rope_scaling(config, SCALINGS["yarn"])


@pytest.mark.parametrize(
    "values, message",
    [
        ({"factor": 2.0}, r"rope_scaling\.rope_type: got None; allowed: linear, yarn, llama3 \(in other types"),
        ({"rope_type": "dynamic", "factor": 2.0}, r"rope_scaling\.rope_type: got 'dynamic'; allowed: linear"),
        ({"rope_type": ["yarn"], "factor": 2.0}, r"rope_scaling\.rope_type: got \['yarn'\]"),
        ({"rope_type": "yarn"}, r"rope_scaling\.factor: missing; rope_type yarn needs factor"),
        ({"rope_type": "linear", "factor": 0.5}, r"rope_scaling\.factor: got 0\.5; allowed: a number, 1 or more"),
        ({"rope_type": "linear", "factor": "2"}, r"rope_scaling\.factor: got '2'"),
        ({"rope_type": "linear", "factor": 2, "beta_fast": 1}, r"rope_scaling: got 'beta_fast'; allowed: for linear: "),
        ({"rope_type": "yarn", "factor": 2, "truncate": 1}, r"rope_scaling\.truncate: got 1; allowed: true or false"),
        (
            {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 0.5},
            r"rope_scaling\.original_max_position_embeddings: got 0\.5; allowed: a number of tokens",
        ),
        (
            {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4},
            r"rope_scaling\.high_freq_factor: got 4; allowed: above low_freq_factor \(4\)",
        ),
    ],
)
def test_refusals(values, message):
    with pytest.raises(ConfigError, match=message):
        check_rope_scaling(values)
