"""Parents as they are published: old configurations, remote code's names, shard by shard and in bounded memory."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from transformers import NemotronHConfig, NemotronHForCausalLM

from benchmarks.comparison import peak_memory
from elastic_core import ElasticModel
from elastic_core.cost.metrics import num_parameters
from elastic_core.model import hf
from elastic_core.model.architectures.nemotron_h import pattern
from tests.support.marks import thorough
from tests.support.models.parents import random_ids, randomise, relative_error
from tests.support.models.real_parents import NANO_12B

SMALL = NANO_12B | {
    "hybrid_override_pattern": "M-*M", "num_hidden_layers": 4, "vocab_size": 97, "hidden_size": 48, "head_dim": 12,
    "intermediate_size": 80, "num_attention_heads": 16, "mamba_num_heads": 16, "mamba_head_dim": 10,
    "ssm_state_size": 14, "layer_norm_epsilon": 1e-3, "time_step_min": 0.05,
    "time_step_limit": [0.05, math.inf],
}  # fmt: skip
LARGE = NANO_12B | {
    "hybrid_override_pattern": "M*-", "num_hidden_layers": 3, "vocab_size": 16384, "hidden_size": 512,
    "intermediate_size": 8192, "num_attention_heads": 16, "mamba_num_heads": 32,
}  # fmt: skip
TRAP = "raise SystemExit('remote code was run')\n"
LOAD = "model = ElasticModel.from_pretrained({directory!r}, torch.{dtype})"


def write_config(directory, values) -> None:
    """config.json, and code that ends the process where it is imported."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values))
    for name in ("configuration_nemotron_h.py", "modeling_nemotron_h.py"):
        (directory / name).write_text(TRAP)


def write_checkpoint(directory, values, dtype=torch.float32, shard_bytes=2**25) -> dict[str, torch.Tensor]:
    """A random checkpoint with remote code's names, in shards with an index; its tensors by those names."""
    write_config(directory, values)
    config = hf.read_config(directory)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in ElasticModel(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    shards, tensors = [{}], {}
    for name, shape in shapes.items():
        name = "backbone." + name.removeprefix("model.") if name.startswith("model.") else name
        tensor = tensors[name] = torch.rand(shape, generator=generator, dtype=dtype) - 0.5
        if sum(t.nbytes for t in shards[-1].values()) > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, directory / file, metadata={"format": "pt"})
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def test_the_published_configuration_is_read_as_it_is_meant(tmp_path):
    write_config(tmp_path, NANO_12B)
    config = hf.read_config(tmp_path)
    assert num_parameters(config) == 12_310_001_152
    assert pattern(config) == NANO_12B["hybrid_override_pattern"]
    assert config.num_hidden_layers == len(config.layers_block_type) == 62
    for name, value in NANO_12B.items():
        if name not in ("hybrid_override_pattern", "torch_dtype", "transformers_version"):
            assert getattr(config, name) == value, name
    assert config.dtype == torch.bfloat16


@pytest.mark.parametrize("missing", ["layer_norm_epsilon", "mamba_hidden_act", "time_step_limit", "conv_kernel"])
def test_what_older_configurations_leave_out_has_their_defaults(tmp_path, missing):
    """Of those of the model's own code: the published values are its defaults."""
    write_config(tmp_path, {name: value for name, value in NANO_12B.items() if name != missing})
    value = getattr(hf.read_config(tmp_path), missing)
    assert (list(value) if isinstance(value, tuple) else value) == NANO_12B[missing]


def test_a_checkpoint_with_its_own_code_is_loaded_exactly_and_without_it(tmp_path):
    tensors = write_checkpoint(tmp_path / "parent", SMALL, shard_bytes=20_000)
    assert len(list((tmp_path / "parent").glob("*.safetensors"))) > 3
    model = ElasticModel.from_pretrained(tmp_path / "parent")
    found = {name.replace("model.", "backbone.", 1): p for name, p in model.named_parameters()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_its_logits_are_those_of_transformers(tmp_path):
    """With an epsilon and a time step unlike the defaults, in the old spelling."""
    write_config(tmp_path / "old", SMALL)
    names = {"hybrid_override_pattern", "num_hidden_layers", "auto_map", "architectures", "transformers_version"}
    values = {name: value for name, value in SMALL.items() if name not in names}
    layers = NemotronHConfig._pattern_to_list(SMALL["hybrid_override_pattern"])
    reference = randomise(NemotronHForCausalLM(NemotronHConfig(layers_block_type=layers, **values)), 0).eval().float()
    reference.save_pretrained(tmp_path / "new")
    (tmp_path / "new" / "config.json").write_text((tmp_path / "old" / "config.json").read_text())
    model = ElasticModel.from_pretrained(tmp_path / "new")
    ids = random_ids(model.config, 0)
    with torch.no_grad():
        assert relative_error(model(ids), reference(ids, use_cache=False).logits) < 1e-5
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "auto_map" not in saved and saved["hybrid_override_pattern"] == SMALL["hybrid_override_pattern"]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A directory in several files, the bytes of its largest tensor, and how many numbers it holds."""
    directory = tmp_path_factory.mktemp("large")
    tensors = write_checkpoint(directory, LARGE, torch.bfloat16, shard_bytes=2**24)
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory, max(t.nbytes for t in tensors.values()), sum(t.numel() for t in tensors.values())


@pytest.mark.parametrize("dtype", ["float32", thorough("bfloat16")])
def test_loading_takes_the_model_and_one_tensor(tmp_path, large, dtype):
    """Of resident memory, pages of mapped files among it, in a process of its own, which has loaded a small model."""
    directory, largest, numbers = large
    room = largest + 20e6
    assert 1.5 * room < 2 * numbers  # a second copy of the model, or all of its files, would not go unnoticed
    write_checkpoint(tmp_path / "small", SMALL)  # what is imported while loading is not counted
    begin = "import torch; from elastic_core import ElasticModel; "
    before, peak = peak_memory(
        begin + LOAD.format(directory=str(tmp_path / "small"), dtype=dtype),
        LOAD.format(directory=str(directory), dtype=dtype),
    )
    assert peak - before - getattr(torch, dtype).itemsize * numbers < room
