"""A copy of a parent: as its files are where that is possible, and in the element types of its files always."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from elastic_core import ElasticModel
from elastic_core.model import architectures, hf
from elastic_core.model.files.parent_copy import copy_model, place_file
from elastic_core.model.files.stored_forward import stored_logits
from tests.support.models.parents import (
    random_config,
    random_ids,
    random_llama_config,
    random_moe_config,
    save_random_parent,
)

CONFIGS = [*map(random_config, range(3)), *map(random_llama_config, range(4)), *map(random_moe_config, range(2))]
TIED = LlamaConfig(
    vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    intermediate_size=24, tie_word_embeddings=True, max_position_embeddings=64,
)  # fmt: skip


def stored(directory) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def copy(source, target, may_link=False, config=None):
    model, reader = ElasticModel.empty(source, config)
    copy_model(model, reader, source, target, may_link)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_logits_of_files_are_those_of_the_model(config, tmp_path):
    """And no parameter stays in memory."""
    save_random_parent(tmp_path, 0, config)
    ids, (model, reader) = random_ids(config, 0), ElasticModel.empty(tmp_path)
    found = stored_logits(model, reader, ids)
    assert torch.equal(found, ElasticModel.from_pretrained(tmp_path)(ids))
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("may_link", [False, True])
def test_files_that_need_no_change_are_taken_as_they_are(tmp_path, may_link):
    """As links if nobody changes them in place, else as copies that a later change of the parent leaves alone."""
    save_random_parent(tmp_path / "a", 0, TIED)
    before = (tmp_path / "a/model.safetensors").read_bytes()
    copy(tmp_path / "a", tmp_path / "b", may_link)
    files = [tmp_path / name / "model.safetensors" for name in "ab"]
    assert os.path.samefile(*files) == may_link and files[1].read_bytes() == before
    if not may_link:
        save_file({"x": torch.zeros(1)}, files[0])
        assert files[1].read_bytes() == before


def test_without_links_files_are_copied(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError

    monkeypatch.setattr("os.link", refuse)
    (tmp_path / "a").write_bytes(b"content")
    place_file(tmp_path / "a", tmp_path / "b", may_link=True)
    assert (tmp_path / "b").read_bytes() == b"content" and not os.path.samefile(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("config", [TIED, random_moe_config(0)], ids=["tied", "experts"])
def test_every_tensor_keeps_its_element_type(tmp_path, config):
    """Also where files are written anew: without a second head, and with a matrix for each expert."""
    save_random_parent(tmp_path / "a", 0, config)
    types = (torch.bfloat16, torch.float32, torch.float16)
    tensors = {name: t.to(types[i % 3]) for i, (name, t) in enumerate(sorted(stored(tmp_path / "a").items()))}
    tensors |= {name: t.bfloat16() for name, t in tensors.items() if ".experts." in name}  # all of a layer's alike
    expected = dict(tensors)
    if config is TIED:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    else:  # stacks of experts under the model's own names
        model = ElasticModel.from_pretrained(tmp_path / "a")
        name = next(name for name in model.layout if name.endswith("experts.up_proj"))
        disk_name = architectures.of(config).disk_name
        numbered = [
            disk_name(f"{name.removesuffix('.up_proj')}.{i}.up_proj.weight") for i in range(config.n_routed_experts)
        ]
        tensors[disk_name(name)] = torch.stack([tensors.pop(other) for other in numbered])
    save_file(tensors, tmp_path / "a/model.safetensors", {"format": "pt"})
    copy(tmp_path / "a", tmp_path / "b", may_link=True)
    found = stored(tmp_path / "b")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert not os.path.samefile(*(tmp_path / name / "model.safetensors" for name in "ab"))


def test_the_configuration_names_the_type_of_the_matrices(tmp_path):
    save_random_parent(tmp_path / "a", 0, TIED)
    tensors = {name: t.bfloat16() for name, t in stored(tmp_path / "a").items()}
    save_file(tensors, tmp_path / "a/model.safetensors", {"format": "pt"})
    copy(tmp_path / "a", tmp_path / "b")
    assert hf.read_config(tmp_path / "b").dtype == torch.bfloat16
    untied = architectures.with_own_head(hf.read_config(tmp_path / "a"))
    copy(tmp_path / "a", tmp_path / "c", config=untied)
    found = stored(tmp_path / "c")
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert found["lm_head.weight"].dtype == torch.bfloat16
