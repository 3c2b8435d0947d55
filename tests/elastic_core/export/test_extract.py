"""Directories in and out: what transformers writes we read, what we write transformers loads; errors are clear."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, NemotronHConfig, NemotronHForCausalLM

from elastic_core import ElasticModel, Submodel, extract
from elastic_core.cost.metrics import num_parameters
from elastic_core.export import elastic_checkpoint
from elastic_core.io import tensor_files
from elastic_core.model import architectures, hf
from tests.support.models.chat import chat_tokenizer
from tests.support.models.parents import (
    CONFIGS,
    random_config,
    random_ids,
    random_submodel,
    randomise,
    relative_error,
    save_random_parent,
)

PER_LAYER = ("intermediate_size", "mamba_num_heads", "num_attention_heads")
BASE = {
    "vocab_size": 37,
    "hidden_size": 24,
    "layers_block_type": NemotronHConfig._pattern_to_list("M-*M-"),
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 5,
    "intermediate_size": 19,
    "mamba_num_heads": 6,
    "mamba_head_dim": 6,
    "n_groups": 2,
    "ssm_state_size": 7,
    "mlp_bias": True,
}
WIDE = Submodel(17, (0, 1, 2, 3, 4), (13, 4), 4, 5, 4)  # MLPs differ
MIXED = Submodel(17, (0, 1, 2, 3), (13, 4), (2, 4), 5, 4)  # Mamba heads differ


@pytest.fixture
def parent(tmp_path):
    # transformers does not apply time_step_min when it generates from a cache, so generation is compared without it.
    config = NemotronHConfig(**BASE, time_step_min=1e-30, eos_token_id=None)
    save_random_parent(tmp_path / "parent", 3, config)
    return tmp_path / "parent"


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def logits_of(directory, ids, **options):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory, **options)(ids, use_cache=False).logits


# In


@pytest.mark.parametrize("trunk", ["model", "backbone"])
@pytest.mark.parametrize("sharded", [False, True])
def test_reads_both_names_of_the_trunk_whole_and_sharded(tmp_path, trunk, sharded):
    reference = randomise(NemotronHForCausalLM(random_config(4)), 4).eval()
    reference.save_pretrained(tmp_path / "m")
    tensors = {name.replace("model.", trunk + ".", 1): t.clone() for name, t in reference.state_dict().items()}
    tensors["mtp.layers.0.norm.weight"] = torch.zeros(3)  # multi-token prediction heads are left out
    (tmp_path / "m" / "model.safetensors").unlink()
    if sharded:
        files = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(tensors)}
        for file in set(files.values()):
            save_file({name: t for name, t in tensors.items() if files[name] == file}, tmp_path / "m" / file)
        (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        save_file(tensors, tmp_path / "m" / "model.safetensors")
    ids = random_ids(reference.config, 4)
    with torch.no_grad():
        assert relative_error(ElasticModel.from_pretrained(tmp_path / "m")(ids), reference(ids).logits) < 1e-5


def test_reads_older_configurations(parent):
    reference = NemotronHForCausalLM.from_pretrained(parent)
    values = config_of(parent)
    del values["layers_block_type"]
    values |= {"hybrid_override_pattern": "M-*M-", "num_hidden_layers": 5, "auto_map": {"AutoConfig": "old.Config"}}
    (parent / "config.json").write_text(json.dumps(values))
    model, ids = ElasticModel.from_pretrained(parent), random_ids(reference.config, 0)
    with torch.no_grad():
        assert relative_error(model(ids), reference(ids).logits) < 1e-5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, ["'gpt2'", "nemotron_h"]),
        ({"layers_block_type": ["mamba", "moe"], "n_group": 3}, ["n_routed_experts=8", "n_group=3"]),
        ({"layers_block_type": ["mamba", "moe"], "n_group": 8}, ["n_routed_experts=8", "16 or more"]),
        ({"layers_block_type": ["mamba", "moe"], "topk_group": 2}, ["topk_group=2", "n_group=1"]),
        ({"layers_block_type": ["mamba", "mlp", "attention", "mamba"]}, ["not expected", "layers.4"]),
        ({"layers_block_type": ["mamba", "mlp", "attention", "mamba", "mlp", "mlp"]}, ["missing", "layers.5"]),
        ({"mamba_num_heads": 5}, ["mamba_num_heads=5", "n_groups=2"]),
        ({"num_attention_heads": 5}, ["num_attention_heads=5", "num_key_value_heads=2"]),
        ({"mamba_hidden_act": "gelu"}, ["'gelu'", "silu"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings"]),
        ({"hidden_size": 25}, ["shape", "24", "25"]),
        ({"intermediate_size": [19, 19]}, ["heterogeneous", "parent"]),
        ({"mamba_num_heads": [6, 4]}, ["heterogeneous", "parent"]),
    ],
)
def test_refuses_what_it_cannot_express(parent, changes, words):
    edit_config(parent, **changes)
    with pytest.raises(ValueError) as error:
        ElasticModel.from_pretrained(parent)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("damage", ["config", "weights", "tensor", "truncated", "shard"])
def test_refuses_incomplete_directories(parent, damage):
    weights = parent / "model.safetensors"
    if damage == "config":
        (parent / "config.json").unlink()
    elif damage == "weights":
        weights.unlink()
    elif damage == "tensor":
        tensors = load_file(weights)
        del tensors["backbone.layers.2.mixer.q_proj.weight"]
        save_file(tensors, weights)
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        names = dict.fromkeys(load_file(weights), "gone.safetensors")
        weights.unlink()
        (parent / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    words = {
        "config": "no config.json",
        "weights": "no model.safetensors",
        "tensor": "q_proj",
        "truncated": "truncated",
        "shard": "gone.safetensors",
    }
    with pytest.raises(ValueError, match=words[damage]) as error:
        ElasticModel.from_pretrained(parent)
    assert str(parent) in str(error.value)


# Out


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("seed", range(4))
def test_save_pretrained_is_loaded_by_transformers(tmp_path, seed, architecture):
    reference = save_random_parent(tmp_path / "a", seed, CONFIGS[architecture](seed))
    model, ids = ElasticModel.from_pretrained(tmp_path / "a"), random_ids(reference.config, seed)
    model.save_pretrained(tmp_path / "b")
    with torch.no_grad():
        assert torch.equal(logits_of(tmp_path / "b", ids), reference(ids, use_cache=False).logits)
        assert torch.equal(ElasticModel.from_pretrained(tmp_path / "b")(ids), model(ids))


def test_bfloat16_stays_bfloat16(parent, tmp_path):
    ElasticModel.from_pretrained(parent, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    extract(tmp_path / "half", Submodel(hidden_size=17), tmp_path / "same")
    extract(tmp_path / "half", Submodel(hidden_size=17), tmp_path / "wide", dtype=torch.float32)
    for name, dtype in (("half", "bfloat16"), ("same", "bfloat16"), ("wide", "float32")):
        assert config_of(tmp_path / name)["dtype"] == dtype
        stored = load_file(tmp_path / name / "model.safetensors")
        small = tuple(name for name in stored if name.endswith(("A_log", ".D", "dt_bias")))  # float32 in exports
        assert {t.dtype for name, t in stored.items() if name not in small} == {getattr(torch, dtype)}


@pytest.mark.parametrize("seed", range(6))
def test_homogeneous_export_is_a_stock_directory(tmp_path, seed):
    save_random_parent(tmp_path / "parent", seed)
    edit_config(tmp_path / "parent", auto_map={"AutoConfig": "configuration_nemotron_h.NemotronHConfig"})
    parent = ElasticModel.from_pretrained(tmp_path / "parent")
    submodel = extract(tmp_path / "parent", random_submodel(parent.config, seed), tmp_path / "out")
    values = config_of(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.py")) and "auto_map" not in values
    assert values["head_dim"] == parent.config.head_dim
    assert values["architectures"] == ["NemotronHForCausalLM"]
    # What vLLM and SGLang read the layers from.
    kept = architectures.pattern(parent.config)
    assert values["hybrid_override_pattern"] == "".join(kept[layer] for layer in submodel.kept_layers)
    assert values["num_hidden_layers"] == len(submodel.kept_layers)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) == num_parameters(parent.config, submodel)
    ids = random_ids(parent.config, seed)
    with torch.no_grad():
        assert relative_error(parent(ids, submodel), model(ids, use_cache=False).logits) < 1e-5


@pytest.mark.parametrize("submodel", [Submodel(hidden_size=17, kept_layers=(0, 2, 4)), WIDE, MIXED])
def test_generation_with_and_without_cache(parent, tmp_path, submodel):
    resolved = extract(parent, submodel, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=not resolved.is_homogeneous)
    ids, elastic = random_ids(model.config, 1, (1, 9)), ElasticModel.from_pretrained(parent)
    # num_logits_to_keep of the family is 1; greedy, no stop token.
    cached, plain = (model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=u) for u in (True, False))
    assert cached.shape == (1, 21) and torch.equal(cached, plain)
    ours = ids
    with torch.no_grad():
        for _ in range(12):
            ours = torch.cat([ours, elastic(ours, submodel)[:, -1:].argmax(-1)], 1)
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("submodel", [WIDE, MIXED, Submodel(num_attention_heads=(2,), intermediate_size=(3, 8))])
def test_heterogeneous_remote_code(parent, tmp_path, submodel):
    resolved = extract(parent, submodel, tmp_path / "out")
    assert (tmp_path / "out" / "modeling_elastic_nemotron_h.py").is_file()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    elastic = ElasticModel.from_pretrained(parent)
    ids, count = random_ids(elastic.config, 0), num_parameters(elastic.config, submodel)
    with torch.no_grad():
        logits = model(ids).logits
        assert relative_error(elastic(ids, submodel), logits) < 1e-5
    assert sum(p.numel() for p in model.parameters()) == count
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert sum(p.numel() for p in built.parameters()) == count
    model.save_pretrained(tmp_path / "again")  # transformers writes it out again, and it loads again
    assert torch.equal(logits_of(tmp_path / "again", ids, trust_remote_code=True), logits)
    with pytest.raises(ValueError, match="it comes from"):
        ElasticModel.from_pretrained(tmp_path / "out")
    assert resolved == submodel.resolve(elastic.config)


@pytest.mark.parametrize("mlp_bias", [True, False])
def test_padded_export_is_stock_and_exact(tmp_path, mlp_bias):
    save_random_parent(tmp_path / "parent", 5, NemotronHConfig(**BASE | {"mlp_bias": mlp_bias}))
    elastic = ElasticModel.from_pretrained(tmp_path / "parent")
    extract(tmp_path / "parent", WIDE, tmp_path / "out", heterogeneous="pad")
    assert config_of(tmp_path / "out")["intermediate_size"] == 13
    assert not list((tmp_path / "out").glob("*.py")) and "auto_map" not in config_of(tmp_path / "out")
    ids = random_ids(elastic.config, 0)
    with torch.no_grad():
        assert relative_error(elastic(ids, WIDE), logits_of(tmp_path / "out", ids)) < 1e-5
    with pytest.raises(ValueError, match=r"mamba_num_heads.*only MLP widths"):
        extract(tmp_path / "parent", MIXED, tmp_path / "no", heterogeneous="pad")
    assert not (tmp_path / "no").exists()


def test_types_without_a_kept_layer_make_no_export_heterogeneous(parent, tmp_path):
    submodel = Submodel(kept_layers=(0, 2), intermediate_size=(3, 5))
    assert extract(parent, submodel, tmp_path / "out").is_homogeneous
    ids, elastic = random_ids(ElasticModel.from_pretrained(parent).config, 0), ElasticModel.from_pretrained(parent)
    with torch.no_grad():
        assert relative_error(elastic(ids, submodel), logits_of(tmp_path / "out", ids)) < 1e-5


def test_tokenizer_and_generation_files_come_along(parent, tmp_path):
    chat_tokenizer().save_pretrained(parent)
    extract(parent, Submodel(hidden_size=9), tmp_path / "out")
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (parent / name).read_bytes()
    given = json.loads((parent / "generation_config.json").read_text())
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert written == given | {"bos_token_id": 0, "eos_token_id": [0, 5], "pad_token_id": 1}


# Whole or not at all


def test_refuses_to_write_over_its_source(parent, tmp_path):
    before = {path.name: path.read_bytes() for path in parent.iterdir()}
    (tmp_path / "link").symlink_to(parent)
    for out in (parent, parent / "..", tmp_path, tmp_path / "link", parent / "." / ".." / "parent"):
        with pytest.raises(ValueError, match="out_directory"):
            extract(parent, Submodel(), out)
    assert {path.name: path.read_bytes() for path in parent.iterdir()} == before


def test_refuses_to_replace_what_is_no_model(parent, tmp_path):
    """And replaces a model: that of the test below."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"work: exists and has no config\.json"):
        extract(parent, Submodel(), tmp_path / "work")
    assert (tmp_path / "work" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_extraction_that_fails_half_way_leaves_what_was_there(parent, tmp_path, monkeypatch, existing, error):
    out = tmp_path / "deep" / "out"
    if existing:
        extract(parent, Submodel(hidden_size=5), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()} if existing else None
    read, calls = tensor_files.Stored.read, []

    def failing(self, runs):
        calls.append(runs)
        if len(calls) == 7:
            raise error("power cut")
        return read(self, runs)

    monkeypatch.setattr(tensor_files.Stored, "read", failing)
    with pytest.raises(error, match="power cut"):
        extract(parent, Submodel(hidden_size=9), out)
    left = {path.name: path.read_bytes() for path in out.iterdir()} if out.exists() else None
    assert left == before
    assert [path.name for path in out.parent.iterdir()] == (["out"] if existing else [])
    monkeypatch.undo()
    extract(parent, Submodel(hidden_size=9), out)  # and an earlier attempt's remains do not stand in the way
    assert config_of(out)["hidden_size"] == 9


def test_shards_hold_every_tensor_once(parent, tmp_path):
    tensors = load_file(parent / "model.safetensors")
    (tmp_path / "s").mkdir()
    entries = {name: tensor_files.Entry(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    hf.write_tensors(tmp_path / "s", entries, tensors.items(), shard_bytes=4000)
    shutil.copy(parent / "config.json", tmp_path / "s")
    index = json.loads((tmp_path / "s" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "s").glob("*.safetensors"))
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    found = []
    for file in files:
        with safe_open(tmp_path / "s" / file, "pt") as handle:
            found += list(handle.keys())
    assert sorted(found) == sorted(tensors)
    ids = random_ids(ElasticModel.from_pretrained(parent).config, 0)
    assert torch.equal(logits_of(tmp_path / "s", ids), logits_of(parent, ids))


def test_bad_arguments(parent, tmp_path):
    with pytest.raises(ValueError, match=r"heterogeneous: got 'zip'.*remote_code"):
        extract(parent, Submodel(), tmp_path / "out", heterogeneous="zip")
    with pytest.raises(ValueError, match="hidden_size: got 99"):
        extract(parent, Submodel(hidden_size=99), tmp_path / "out")
    with pytest.raises(ValueError, match=r"no elastic\.json"):
        extract(parent, 0.5, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_budgets_by_name_fraction_and_count(parent, tmp_path):
    config = hf.read_config(parent)
    half, small = Submodel(hidden_size=14, intermediate_size=10), Submodel(hidden_size=6)
    between = Submodel(hidden_size=20)
    members = {"half": elastic_checkpoint.Member(0.5, half), "small": elastic_checkpoint.Member(0.2, small)}
    elastic_checkpoint.write(parent, config, members, [between])
    full, count = num_parameters(config), num_parameters(config, between)
    for number, (budget, expected) in enumerate(
        [
            ("half", half),
            ("small", small),
            (1.0, Submodel()),
            (count, between),
            (count / full, between),
            (f"{count / 1e3:.3f}K", between),
            (f"{count / 1e6:.6f}m", between),
        ]
    ):
        assert extract(parent, budget, tmp_path / str(number)) == expected.resolve(config)
    for budget in ("large", "-1", 0, 1e12, "nan", "", 0.01):
        with pytest.raises(ValueError, match="budget: got"):
            extract(parent, budget, tmp_path / "no")
