"""The Llama architecture against transformers, against slices, and against a naive model written from the equations."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.activations import ACT2FN

from elastic_core import ElasticModel, Submodel, extract, rank
from elastic_core.config import ConfigError
from elastic_core.cost.metrics import num_parameters
from elastic_core.model import architectures, hf
from elastic_core.model.submodel import full_sizes
from elastic_core.search.choices import Choices
from elastic_core.search.space import ElasticSpace
from tests.support.models.parents import (
    random_elastic,
    random_ids,
    random_llama_config,
    random_reference,
    random_submodel,
    relative_error,
    save_random_parent,
)
from tests.support.oracles.calibration import AGGREGATE, batches_of
from tests.support.oracles.index_sets import in_groups

PER_LAYER = ("intermediate_size", "num_attention_heads")
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BASE = LlamaConfig(
    vocab_size=37,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=6,
    intermediate_size=19,
    max_position_embeddings=64,
    rope_parameters=LLAMA3 | {"original_max_position_embeddings": 16},
    tie_word_embeddings=True,
    attention_bias=True,
    mlp_bias=True,
    eos_token_id=None,
    bos_token_id=None,
)
WIDE = Submodel(hidden_size=18, kept_layers=(0, 1, 2), intermediate_size=(13, 4, 7), num_attention_heads=2)


def entry(value, layer: int):
    return value[layer] if isinstance(value, tuple) else value


def kept_units(config, submodel) -> dict[str, list[int]]:
    """The kept units of every unit key, unit by unit, also of dropped layers."""
    submodel, kept = submodel.resolve(config), {}
    kept["hidden"] = in_groups(config.hidden_size, submodel.hidden_size)
    for i in range(config.num_hidden_layers):
        heads = entry(submodel.num_attention_heads, i)
        kept[f"attention_heads.{i}"] = in_groups(config.num_attention_heads, heads, config.num_key_value_heads)
        kept[f"ffn.{i}"] = in_groups(config.intermediate_size, entry(submodel.intermediate_size, i))
    return kept


def masks_of(config, submodel) -> dict[str, torch.Tensor]:
    """One-hot gates of a submodel: 0/1 per unit at full size."""
    masks = {key: torch.zeros(size, dtype=torch.float64) for key, size in full_sizes(config).items()}
    for key, units in kept_units(config, submodel).items():
        masks[key][units] = 1
    layers = submodel.resolve(config).kept_layers
    masks["depth"] = torch.tensor([float(i in layers) for i in range(config.num_hidden_layers)], dtype=torch.float64)
    return masks


def kept_entries(config, submodel, name: str, shape) -> torch.Tensor:
    """Which entries of a parameter a submodel keeps, written without `elastic_core.model.dims`."""
    kept, layer = kept_units(config, submodel), name.split(".")[2] if ".layers." in name else None
    size = architectures.of(config).head_dim(config)
    query = [h * size + d for h in kept.get(f"attention_heads.{layer}", ()) for d in range(size)]
    everything = [list(range(rows)) for rows in shape]
    part = name.split(".")[-2]
    rows = {"q_proj": query, "gate_proj": kept.get(f"ffn.{layer}"), "up_proj": kept.get(f"ffn.{layer}")}
    columns = {"o_proj": query, "down_proj": kept.get(f"ffn.{layer}")}
    if part in ("embed_tokens", "lm_head"):
        axes = [everything[0], kept["hidden"]]
    elif part in columns or "layernorm" in part or part == "norm":
        axes = [kept["hidden"], columns.get(part)][: len(shape)]
    elif part in ("q_norm", "k_norm"):
        axes = everything
    else:
        axes = [rows.get(part, everything[0]), kept["hidden"]][: len(shape)]
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[torch.meshgrid(*(torch.tensor(axis) for axis in axes), indexing="ij")] = True
    return mask


def naive_logits(model: ElasticModel, ids, gates) -> torch.Tensor:
    """The soft forward (eqs. 21–35, for gated MLPs) head by head; RoPE by complex numbers, frequencies by transformers.

    Angles are rounded to float32, as transformers has them in models of any element type.
    """
    config, p, g = model.config, dict(model.named_parameters()), gates["hidden"]
    reference = architectures.model_class(config)(config).model.rotary_emb
    size, per_group = (
        architectures.of(config).head_dim(config),
        config.num_attention_heads // config.num_key_value_heads,
    )
    angles = torch.arange(ids.shape[1]).float()[:, None] * reference.inv_freq
    turn = torch.complex(*((f(angles) * reference.attention_scaling).double() for f in (torch.cos, torch.sin)))

    def norm(x, weight, live):
        return weight * x / torch.sqrt((x**2).sum(-1, keepdim=True) / live + config.rms_norm_eps)

    def linear(x, name):
        return F.linear(x, p[name + ".weight"], p.get(name + ".bias"))

    def rotated(x):
        turned = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * turn
        return torch.cat([turned.real, turned.imag], -1)

    def attention(x, name, i):
        causal, outputs = torch.ones(ids.shape[1], ids.shape[1]).tril().bool(), []
        for h in range(config.num_attention_heads):
            own, group = slice(h * size, (h + 1) * size), slice(h // per_group * size, (h // per_group + 1) * size)
            q, k = linear(x, name + "q_proj")[..., own], linear(x, name + "k_proj")[..., group]
            if name + "q_norm.weight" in p:
                q, k = norm(q, p[name + "q_norm.weight"], size), norm(k, p[name + "k_norm.weight"], size)
            scores = (rotated(q) @ rotated(k).transpose(1, 2) / size**0.5).masked_fill(~causal, -torch.inf)
            outputs.append(
                scores.softmax(-1) @ linear(x, name + "v_proj")[..., group] * gates[f"attention_heads.{i}"][h]
            )
        return linear(torch.cat(outputs, -1), name + "o_proj")

    def mlp(x, name, i):
        product = ACT2FN[config.hidden_act](linear(x, name + "gate_proj")) * linear(x, name + "up_proj")
        return linear(product * gates[f"ffn.{i}"], name + "down_proj")

    x = p["model.embed_tokens.weight"][ids] * g
    for i in range(config.num_hidden_layers):
        layer, write = f"model.layers.{i}.", g * gates["depth"][i]
        x = x + write * attention(norm(x, p[layer + "input_layernorm.weight"], g.sum()), layer + "self_attn.", i)
        x = x + write * mlp(norm(x, p[layer + "post_attention_layernorm.weight"], g.sum()), layer + "mlp.", i)
    head = p.get("lm_head.weight", p["model.embed_tokens.weight"])
    return norm(x, p["model.norm.weight"], g.sum()) @ head.T


# The whole model, its slices and its extracted ones


@pytest.mark.parametrize("seed", range(20))
def test_full_logits_are_those_of_transformers(seed):
    reference = random_reference(seed, random_llama_config(seed))
    model = ElasticModel(reference.config)
    model.load_state_dict(reference.state_dict(), strict=False)  # transformers lists a tied head twice
    for length in (1, 2, 33, 90):  # also past max_position_embeddings, where scaled frequencies differ most
        ids = random_ids(reference.config, seed, (2, length))
        with torch.no_grad():
            assert relative_error(model(ids), reference(ids, use_cache=False).logits) < 1e-5, length


@pytest.mark.parametrize("heterogeneous", [(), PER_LAYER])
@pytest.mark.parametrize("seed", range(10))
def test_soft_at_one_hot_is_the_slice(seed, heterogeneous):
    model = random_elastic(seed, random_llama_config(seed)).double()
    ids = random_ids(model.config, seed, (2, 13))
    for number in range(2):
        submodel = random_submodel(model.config, 100 * seed + number, heterogeneous)
        masks = masks_of(model.config, submodel)
        with torch.no_grad():
            hard, soft, naive = model(ids, submodel), model(ids, gates=masks), naive_logits(model, ids, masks)
        assert relative_error(soft, hard) < 1e-12
        assert relative_error(naive, hard) < 1e-12


@pytest.mark.parametrize("seed", range(6))
def test_fractional_gates_and_all_gradients_equal_the_naive_model(seed):
    model = random_elastic(seed, random_llama_config(seed)).double()
    ids, generator = random_ids(model.config, seed, (2, 9)), torch.Generator().manual_seed(seed)
    sizes = full_sizes(model.config) | {"depth": model.config.num_hidden_layers}
    gates = {key: torch.rand(n, generator=generator, dtype=torch.float64) + 0.05 for key, n in sizes.items()}
    leaves = {**dict(model.named_parameters()), **{key: gate.requires_grad_() for key, gate in gates.items()}}
    results = []
    for logits in (model(ids, gates=gates), naive_logits(model, ids, gates)):
        results.append([logits.detach(), *torch.autograd.grad(logits.log_softmax(-1)[..., 3].sum(), leaves.values())])
    for name, ours, naive in zip(["logits", *leaves], *results, strict=True):
        assert (ours - naive).abs().max() < 1e-9 * max(1, naive.abs().max()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(10))
def test_slice_and_its_gradients_are_the_extracted_models(tmp_path, seed, dtype):
    save_random_parent(tmp_path / "parent", seed, random_llama_config(seed))
    model = ElasticModel.from_pretrained(tmp_path / "parent", dtype=dtype)
    config, ids, exact = model.config, random_ids(model.config, seed), dtype == torch.float64
    submodel = extract(tmp_path / "parent", random_submodel(config, seed + 50), tmp_path / "submodel")
    assert not list((tmp_path / "submodel").glob("*.py"))
    extracted = AutoModelForCausalLM.from_pretrained(tmp_path / "submodel", dtype=dtype)
    assert type(extracted) is architectures.model_class(config)
    assert sum(p.numel() for p in extracted.parameters()) == num_parameters(config, submodel)
    theirs, ours = extracted(ids, use_cache=False).logits, model(ids, submodel)
    soft = model(ids, gates={key: mask.to(dtype) for key, mask in masks_of(config, submodel).items()})
    # transformers' norms and softmax are of float32 in a float64 model too.
    assert relative_error(ours, theirs) < (2e-6 if exact else 1e-5)
    assert relative_error(soft, ours) < (1e-12 if exact else 1e-5)
    for logits in (theirs, ours):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in extracted.named_parameters()}
    largest = max(gradient.abs().max() for gradient in gradients.values())
    number = {layer: str(i) for i, layer in enumerate(submodel.kept_layers)}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if ".layers." in name:
            if int(parts[2]) not in number:
                assert parameter.grad is None, name
                continue
            parts[2] = number[int(parts[2])]
        kept, gradient = kept_entries(config, submodel, name, parameter.shape), gradients.pop(".".join(parts))
        scale = torch.maximum(gradient.abs().max(), 1e-2 * largest)  # some vanish, and k_proj's bias has none
        assert (parameter.grad[kept].view(gradient.shape) - gradient).abs().max() / scale < 5e-5, name
        assert not parameter.grad[~kept].any(), name
    assert not gradients


def test_the_same_sizes_are_counted_and_nested():
    config = random_llama_config(11)
    for seed in range(6):
        larger = random_submodel(config, seed, PER_LAYER).resolve(config)
        smaller = replace(larger, kept_layers=larger.kept_layers[:1], intermediate_size=1).resolve(config)
        assert smaller.is_within(larger, config) and not larger.is_within(smaller, config)
        shapes = {
            name: tuple(dim.size for dim in dims) for name, dims in architectures.parameter_layout(config).items()
        }
        kept = [
            name
            for name in shapes
            if ".layers." not in name or int(name.split(".")[2]) in larger.resolve(config).kept_layers
        ]
        count = sum(int(kept_entries(config, larger, name, shapes[name]).sum()) for name in kept)
        assert num_parameters(config, larger) == count


# Importance


@pytest.mark.parametrize("aggregation", AGGREGATE)
@pytest.mark.parametrize("seed", range(4))
def test_width_scores_equal_the_naive_ones(seed, aggregation):
    """From the activations of transformers' own modules: norms, queries, and what enters the last projection."""
    reference, seen = random_reference(seed, random_llama_config(seed)), {}
    model, batches = ElasticModel(reference.config), batches_of(reference.config, seed)
    model.load_state_dict(reference.state_dict(), strict=False)

    def keep(key, value):
        seen.setdefault(key, []).append(value.detach().double().flatten(0, 1))

    for i, layer in enumerate(reference.model.layers):
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_hook(lambda _, __, out: keep("hidden", out))
        layer.self_attn.q_proj.register_forward_hook(lambda _, __, out, i=i: keep(f"attention_heads.{i}", out))
        layer.mlp.down_proj.register_forward_hook(lambda _, inputs, __, i=i: keep(f"ffn.{i}", inputs[0]))
    reference.model.norm.register_forward_hook(lambda _, __, out: keep("hidden", out))
    with torch.no_grad():
        for ids in batches:
            reference(ids, use_cache=False)
    options = {"basis": "channels", "measure": "projection", "depth_method": "one_shot_nmse"}
    ranking = rank(model, batches, aggregation=aggregation, **options)
    assert ranking.scores.keys() == seen.keys()
    for key, values in seen.items():
        activation = torch.cat(values)
        if key.startswith("attention"):
            activation = activation.unflatten(1, (reference.config.num_attention_heads, -1)).norm(dim=-1)
        assert relative_error(ranking.scores[key], AGGREGATE[aggregation](activation)) < 1e-5, key


# Directories


@pytest.fixture
def parent(tmp_path):
    save_random_parent(tmp_path / "parent", 3, BASE)
    return tmp_path / "parent"


def logits_of(directory, ids):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory)(ids, use_cache=False).logits


def test_a_tied_head_is_one_parameter_and_one_tensor(parent, tmp_path):
    model = ElasticModel.from_pretrained(parent)
    assert not hasattr(model, "lm_head") and num_parameters(BASE) == sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path / "saved")
    extract(parent, Submodel(hidden_size=12), tmp_path / "extracted")
    for name in ("saved", "extracted"):
        tensors = load_file(tmp_path / name / "model.safetensors")
        assert "lm_head.weight" not in tensors and "model.embed_tokens.weight" in tensors
    ids = random_ids(BASE, 0)
    with torch.no_grad():
        assert relative_error(model(ids, Submodel(hidden_size=12)), logits_of(tmp_path / "extracted", ids)) < 1e-5
    model(ids).sum().backward()  # what it learns as a head and as embeddings adds up
    reference = AutoModelForCausalLM.from_pretrained(parent)
    reference(ids, use_cache=False).logits.sum().backward()
    gradients = [m.model.embed_tokens.weight.grad for m in (model, reference)]
    assert relative_error(*gradients) < 1e-5


@pytest.mark.parametrize("has_bias", [True, False])
def test_padded_export_is_stock_and_exact(tmp_path, has_bias):
    values = BASE.to_dict() | {"mlp_bias": has_bias, "attention_bias": has_bias}
    save_random_parent(tmp_path / "parent", 5, LlamaConfig(**values))
    extract(tmp_path / "parent", WIDE, tmp_path / "out", heterogeneous="pad")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == 13
    elastic, ids = ElasticModel.from_pretrained(tmp_path / "parent"), random_ids(BASE, 0)
    with torch.no_grad():
        assert relative_error(elastic(ids, WIDE), logits_of(tmp_path / "out", ids)) < 1e-5


@pytest.mark.parametrize(
    ("submodel", "heterogeneous", "words"),
    [
        (WIDE, "remote_code", r"intermediate_size: got \[13, 4, 7\].*llama cannot express.*heterogeneous='pad'"),
        (Submodel(num_attention_heads=(2, 4, 2)), "pad", r"num_attention_heads: got \[2, 4, 2\].*one size for all"),
        (Submodel(hidden_size=13), "pad", "hidden_size: got 13 with num_attention_heads 6; allowed: multiples"),
        (Submodel(mamba_num_heads=2), "pad", "mamba_num_heads: got 2; allowed: nothing"),
        (Submodel(num_attention_heads=3), "pad", "num_attention_heads: got 3; allowed: 2 to 6.*multiples of 2"),
    ],
)
def test_refuses_sizes_that_it_cannot_express(parent, tmp_path, submodel, heterogeneous, words):
    with pytest.raises(ValueError, match=words):
        extract(parent, submodel, tmp_path / "out", heterogeneous)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (BASE, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'.*'llama3'"),
        (BASE, {"num_key_value_heads": 4}, "num_attention_heads=6.*num_key_value_heads=4"),
        (BASE, {"intermediate_size": [19, 19, 4]}, "heterogeneous submodel cannot be a parent"),
        (BASE, {"per_layer_config": {"1": {"intermediate_size": 16}}}, "per_layer_config; allowed: a parent whose"),
        (random_llama_config(3), {"layer_types": ["sliding_attention"] * 4}, "sliding_attention.*'full_attention'"),
        (random_llama_config(3), {"num_hidden_layers": 3, "layer_types": None}, r"not expected: \['model.layers.3"),
    ],
)
def test_refuses_parents_that_it_cannot_express(tmp_path, config, changes, words):
    save_random_parent(tmp_path / "parent", 3, config)
    path = tmp_path / "parent" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=words):
        ElasticModel.from_pretrained(tmp_path / "parent")


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"heterogeneous": ("num_attention_heads",)}, "choices.heterogeneous: got 'num_attention_heads'"),
        ({"hidden_size": (24, 16)}, "choices.hidden_size: got 16 with num_attention_heads 6"),
        ({"hidden_size": (24, 18), "num_attention_heads": (6, 4)}, "got 18 with num_attention_heads 4"),
    ],
)
def test_choices_that_no_directory_could_say_are_refused_early(choices, words):
    with pytest.raises(ConfigError, match=words):
        ElasticSpace(BASE, Choices(**choices), (0, 1, 2))


@pytest.mark.parametrize("seed", range(5))
def test_generation_with_and_without_cache(tmp_path, seed):
    save_random_parent(tmp_path / "parent", seed, random_llama_config(seed))
    elastic = ElasticModel.from_pretrained(tmp_path / "parent")
    submodel = extract(tmp_path / "parent", random_submodel(elastic.config, seed), tmp_path / "out")
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), random_ids(elastic.config, 1, (1, 9))
    cached, plain = (model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False))
    ours = ids
    with torch.no_grad():
        for _ in range(8):
            ours = torch.cat([ours, elastic(ours, submodel)[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, plain) and torch.equal(ours, plain)


def test_old_files_frequencies_are_left_out(parent):
    tensors = load_file(parent / "model.safetensors")
    reader = hf.TensorReader(parent)
    assert sorted(reader.files) == sorted(tensors)
    assert architectures.of(BASE).canonical_name("model.layers.0.self_attn.rotary_emb.inv_freq") is None


@pytest.mark.thorough
def test_a_compiled_slice_is_one_graph():
    config = LlamaConfig(**BASE.to_dict() | {"num_hidden_layers": 2})
    model, ids = random_elastic(5, config), random_ids(config, 5)
    compiled = torch.compile(model.hidden_states, fullgraph=True, backend="eager")
    for number in range(2):
        sliced = model.slice(random_submodel(config, number, all_layers=True))
        assert relative_error(compiled(ids, sliced), model.hidden_states(ids, sliced)) < 1e-6
