"""Mixtures of experts in nemotron_h: loaded, counted, sliced and extracted as transformers has them."""

import dataclasses
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import NemotronHConfig, NemotronHForCausalLM

from elastic_core import ElasticModel, Submodel, extract
from elastic_core.config import ConfigError
from elastic_core.cost.memory import Memory
from elastic_core.cost.metrics import (
    ACTIVE_PARAMETERS,
    PARAMETERS,
    exact_cost,
    expected_cost,
    memory_parts,
    num_active_parameters,
    num_parameters,
)
from elastic_core.export import elastic_checkpoint
from elastic_core.export.nested import NestedModel
from elastic_core.model import architectures
from elastic_core.model.architectures.nemotron_h import layers_of, pattern
from elastic_core.model.architectures.nemotron_h_ffn import fewest_experts
from elastic_core.model.dims import layer_index, narrow
from elastic_core.model.hf import check_config, read_config
from elastic_core.search.choices import Choices
from elastic_core.search.selection import Member
from elastic_core.search.space import ElasticSpace
from tasks.evaluation.text_scores import count_parameters
from tests.support.models.moe import SEEDS, load
from tests.support.models.parents import (
    random_elastic,
    random_ids,
    random_moe_config,
    random_reference,
    random_submodel,
    relative_error,
    save_random_parent,
)

LARGE = NemotronHConfig(  # 30B-A3B
    vocab_size=131072,
    hidden_size=2688,
    layers_block_type=NemotronHConfig._pattern_to_list("MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"),
    num_attention_heads=32,
    num_key_value_heads=2,
    head_dim=128,
    mamba_num_heads=64,
    mamba_head_dim=64,
    n_groups=8,
    ssm_state_size=128,
    n_routed_experts=128,
    num_experts_per_tok=6,
    moe_intermediate_size=1856,
    moe_shared_expert_intermediate_size=3712,
    routed_scaling_factor=2.5,
)


def one_hot_gates(config, submodel):
    """Gates that are 1 on what `submodel` keeps and 0 elsewhere."""
    sizes, gates = submodel.sizes(config), {}
    for key, units in architectures.units(config).items():
        gates[key] = torch.zeros(units.size)
        gates[key][units.prefix(sizes[key])] = 1
    kept = [float(layer in submodel.kept_layers) for layer in range(architectures.num_layers(config))]
    return gates | {"depth": torch.tensor(kept)}


def test_the_random_configurations_are_of_all_kinds():
    configs = [random_moe_config(seed) for seed in SEEDS]
    for values in (
        {config.moe_latent_size is None for config in configs},
        {config.norm_topk_prob for config in configs},
        {config.n_group > 1 for config in configs},
        {config.topk_group < config.n_group for config in configs},
        {config.num_experts_per_tok > 1 for config in configs},
        {config.mlp_bias for config in configs},
    ):
        assert values == {True, False}


@pytest.mark.parametrize("seed", SEEDS)
def test_whole_slice_mask_and_extracted_directory_are_one_model(tmp_path, seed):
    """The slice with its gradients."""
    config = random_moe_config(seed)
    reference, ids = save_random_parent(tmp_path / "parent", seed, config), random_ids(config, seed)
    model = ElasticModel.from_pretrained(tmp_path / "parent").eval()
    with torch.no_grad():
        assert relative_error(model(ids), reference(ids, use_cache=False).logits) < 1e-5
    for number in range(2):
        submodel = random_submodel(config, 10 * seed + number, all_layers=number == 0)
        # With all channels: a norm over one of them, where D·x nearly cancels it, loses digits in transformers too.
        submodel = dataclasses.replace(submodel, mamba_head_dim=None).resolve(config)
        extract(tmp_path / "parent", submodel, tmp_path / f"model{number}")
        extracted = load(tmp_path / f"model{number}")
        assert num_parameters(config, submodel) == count_parameters(extracted)["num_parameters"]
        ours, theirs = model(ids, submodel), extracted(ids, use_cache=False).logits
        assert relative_error(ours, theirs) < 1e-5
        assert relative_error(model(ids, gates=one_hot_gates(config, submodel)), theirs) < 1e-5
        assert_gradients_alike(model, ours, extracted, theirs, submodel)


def assert_gradients_alike(model, ours, extracted, theirs, submodel):
    """Every weight's, of a sum of the logits with random signs; outside the slice there is none."""
    model.zero_grad()
    signs = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0))
    for logits in (ours, theirs):
        (logits * signs).sum().backward()
    gradients = {name: parameter.grad for name, parameter in extracted.named_parameters()}
    largest = max(gradient.abs().max() for gradient in gradients.values())
    sizes, number = submodel.sizes(model.config), {layer: i for i, layer in enumerate(submodel.kept_layers)}
    for name, parameter in model.named_parameters():
        layer = layer_index(name)
        if (layer is not None and layer not in number) or not parameter.requires_grad:
            assert parameter.grad is None
            continue
        there = name if layer is None else name.replace(f"layers.{layer}.", f"layers.{number[layer]}.", 1)
        kept = narrow(parameter.grad, model.layout[name], sizes)
        assert (kept - gradients[there]).abs().max() < 1e-5 * largest, name
        assert parameter.grad.abs().sum().item() == pytest.approx(kept.abs().sum().item(), rel=1e-4), name


@pytest.mark.parametrize("seed", SEEDS)
def test_slice_and_mask_agree_in_float64(seed):
    config = random_moe_config(seed)
    model, ids = random_elastic(seed, config).double(), random_ids(config, seed)
    submodel = random_submodel(config, seed, all_layers=True).resolve(config)
    gates = {key: gate.double() for key, gate in one_hot_gates(config, submodel).items()}
    with torch.no_grad():
        assert relative_error(model(ids, gates=gates), model(ids, submodel)) < 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_gates_near_one_hot_are_near_the_slice(seed):
    """Experts that have all but gone are chosen as little as those that have."""
    config = random_moe_config(seed)
    model, ids = random_elastic(seed, config), random_ids(config, seed)
    submodel = Submodel(num_experts=fewest_experts(config)).resolve(config)
    gates = {key: gate.clamp(min=1e-6) for key, gate in one_hot_gates(config, submodel).items() if "experts" in key}
    with torch.no_grad():
        assert relative_error(model(ids, submodel), model(ids)) > 0.01
        assert relative_error(model(ids, gates=gates), model(ids, submodel)) < 1e-4


def test_corrections_stay_in_float32_beside_bfloat16(tmp_path):
    """As in transformers: rounded, large ones that differ a little would send tokens to other experts."""
    config = random_moe_config(3)
    reference = random_reference(3, config)
    layer = layers_of(config, "E")[0]
    bias = reference.model.layers[layer].mixer.gate.e_score_correction_bias
    bias.copy_(30 + 0.05 * torch.randn(bias.shape, generator=torch.Generator().manual_seed(0)))
    reference.save_pretrained(tmp_path / "parent")
    elastic_checkpoint.write(tmp_path / "parent", config, {"full": Member(1.0, Submodel())}, [])
    extract(tmp_path / "parent", Submodel(), tmp_path / "extracted", dtype=torch.bfloat16)
    name = f"model.layers.{layer}.mixer.gate.e_score_correction_bias"
    nested = NestedModel.from_pretrained(tmp_path / "parent", torch.bfloat16)
    ours = ElasticModel.from_pretrained(tmp_path / "parent", torch.bfloat16)
    for model in (load(tmp_path / "extracted", torch.bfloat16), nested.at("full"), ours):
        assert torch.equal(model.get_parameter(name) if model is ours else model.get_buffer(name), bias)
        assert model.get_parameter(f"model.layers.{layer}.norm.weight").dtype == torch.bfloat16


def test_an_absent_expert_is_never_chosen_and_a_fading_one_still_is():
    config = random_moe_config(1)
    config.n_group = config.topk_group = 1
    model, ids = random_elastic(1, config), random_ids(config, 1)
    layer = layers_of(config, "E")[0]
    mixer, chosen = model.model.layers[layer].mixer, []
    with torch.no_grad():  # the last one has every token, as long as it is there
        mixer.gate.e_score_correction_bias[-1] = 100.0
    route = mixer._route

    def remember(x, sliced):
        chosen.append(route(x, sliced)[0])
        return route(x, sliced)

    mixer._route = remember
    gate = torch.ones(config.n_routed_experts)
    for value, is_chosen in ((1.0, True), (1e-3, True), (0.0, False)):
        gate[-1] = value
        model(ids, gates={f"experts.{layer}": gate})
        assert bool((chosen[-1] == config.n_routed_experts - 1).any(-1).all()) is is_chosen


def test_names_in_files_are_those_of_transformers(tmp_path):
    config = random_moe_config(0)
    reference = save_random_parent(tmp_path / "theirs", 0, config)
    model = ElasticModel.from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    extract(tmp_path / "theirs", Submodel(), tmp_path / "extracted")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    layer = layers_of(config, "E")[0]
    assert f"backbone.layers.{layer}.mixer.experts.1.up_proj.weight" in theirs
    for name in ("ours", "extracted"):
        ours = load_file(tmp_path / name / "model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        loaded = load(tmp_path / name).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in reference.state_dict().items())


def test_experts_in_one_tensor_are_read_too(tmp_path):
    """Under the model's own names, and in a file that lacks one of them."""
    config = random_moe_config(3)
    reference = save_random_parent(tmp_path / "parent", 3, config)
    tensors, submodel = reference.state_dict(), random_submodel(config, 3, all_layers=True)
    extract(tmp_path / "parent", submodel, tmp_path / "numbered")
    numbered = load_file(tmp_path / "parent" / "model.safetensors")
    save_file(tensors, tmp_path / "parent" / "model.safetensors")
    model = ElasticModel.from_pretrained(tmp_path / "parent")
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    extract(tmp_path / "parent", submodel, tmp_path / "stacked")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("numbered", "stacked"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    gone = next(name for name in numbered if re.search(r"experts\.2\.up_proj", name))
    save_file({name: t for name, t in numbered.items() if name != gone}, tmp_path / "parent" / "model.safetensors")
    with pytest.raises(ValueError, match=r"experts\.up_proj lacks experts \[2\]"):
        ElasticModel.from_pretrained(tmp_path / "parent")


@pytest.mark.parametrize("heterogeneous", ["pad", "remote_code"])
def test_mlps_of_several_widths_beside_experts(tmp_path, heterogeneous):
    """transformers puts no experts together for the class of a modeling file, unless that file tells it to."""
    config = random_moe_config(0)
    config.layers_block_type = ["mlp", "moe", "full_attention", "mlp"]
    save_random_parent(tmp_path / "parent", 0, config)
    model, ids = ElasticModel.from_pretrained(tmp_path / "parent"), random_ids(config, 0)
    submodel = Submodel(intermediate_size=(12, 8), num_experts=config.n_routed_experts - config.n_group)
    extract(tmp_path / "parent", submodel, tmp_path / "model", heterogeneous)
    with torch.no_grad():
        assert relative_error(model(ids, submodel), load(tmp_path / "model")(ids, use_cache=False).logits) < 1e-5


# Counts


def test_the_published_count():
    with torch.device("meta"):
        counts = count_parameters(NemotronHForCausalLM(LARGE))
    assert num_parameters(LARGE) == counts["num_parameters"] == 31_577_940_288
    assert num_active_parameters(LARGE) == counts["num_active_parameters"] == 3_580_076_352


@pytest.mark.parametrize("seed", SEEDS)
def test_active_parameters_are_what_one_token_uses(seed):
    """Those that have a gradient after a single token, and of embeddings and of rows of zeros all."""
    config = random_moe_config(seed)
    submodel = random_submodel(config, seed).resolve(config)
    model = random_elastic(seed, config)
    model(random_ids(config, seed, (1, 1)), submodel).sum().backward()
    used, types = 0, pattern(config)
    for layer in submodel.kept_layers:
        if types[layer] == "E":
            experts = model.model.layers[layer].mixer.experts
            used += sum(int((p.grad.flatten(1) != 0).any(1).sum()) for p in (experts.up_proj, experts.down_proj))
    per_expert = config.num_experts_per_tok * 2 * sum(types[layer] == "E" for layer in submodel.kept_layers)
    assert used == per_expert
    space = config.moe_latent_size or submodel.hidden_size
    idle = num_parameters(config, submodel) - num_active_parameters(config, submodel)
    mixtures = sum(types[layer] == "E" for layer in submodel.kept_layers)
    experts = mixtures and submodel.num_experts - config.num_experts_per_tok
    assert idle == mixtures * experts * 2 * submodel.moe_intermediate_size * space


@pytest.mark.parametrize("metric", [PARAMETERS, ACTIVE_PARAMETERS], ids=lambda metric: metric.name)
def test_expected_cost_is_exact_where_choices_are_certain_and_differentiable(metric):
    config = random_moe_config(2)
    submodel = random_submodel(config, 5, all_layers=True).resolve(config)
    layers = torch.ones(architectures.num_layers(config), dtype=torch.float64)
    sizes = {
        key: torch.tensor(float(size), dtype=torch.float64, requires_grad=True)
        for key, size in submodel.sizes(config).items()
    }
    cost = expected_cost(metric, config, sizes, layers)
    assert cost.item() == exact_cost(metric, config, submodel)
    gradients = dict(zip(sizes, torch.autograd.grad(cost, list(sizes.values())), strict=True))
    layer = layers_of(config, "E")[0]
    for field, key in (("moe_intermediate_size", "expert_ffn"), ("moe_shared_expert_intermediate_size", "shared_ffn")):
        one_less = Submodel(**submodel.to_dict() | {field: getattr(submodel, field) - 1})
        difference = exact_cost(metric, config, submodel) - exact_cost(metric, config, one_less)
        assert sum(gradients[f"{key}.{i}"] for i in layers_of(config, "E")) == difference
    of_experts, router = gradients[f"experts.{layer}"], submodel.hidden_size + 1
    width = 2 * submodel.moe_intermediate_size * (config.moe_latent_size or submodel.hidden_size)
    assert of_experts == router + (width if metric is PARAMETERS else 0)


@pytest.mark.parametrize("weights, size", [("float32", 4.0), ("fp8", 1.0)])
def test_experts_are_matrices_in_memory(weights, size):
    experts = 23 * 128 * 2 * 1856 * 2688
    parts = memory_parts(Memory(1024, weights=weights), LARGE)
    assert size * experts < parts["weights"] <= size * experts + 4 * (num_parameters(LARGE) - experts)
    alone = memory_parts(Memory(2048), LARGE, Submodel(kept_layers=(1,)))["activations"]
    assert alone == 2 * 2048 * (2 * 2688 + 128 + 6 * (1856 + 2688) + 2 * 3712)  # at a token: router, experts, shared


# What is refused


@pytest.mark.parametrize("field", ["n_group", "num_experts_per_tok", "moe_latent_size"])
def test_a_configuration_without_what_routing_takes_is_refused(field):
    config = random_moe_config(0)
    setattr(config, field, 0)
    with pytest.raises(ValueError, match=f"{field}=0; allowed: 1 or more"):
        check_config(config)


def test_choices_that_routing_cannot_do_are_refused():
    config = random_moe_config(0)
    config.n_group, config.topk_group, config.num_experts_per_tok, config.n_routed_experts = 3, 1, 3, 15
    layers = tuple(range(architectures.num_layers(config)))
    assert len(ElasticSpace(config, Choices(num_experts=(15, 12, 9)), layers).slots[-4].sizes) == 3
    for sizes in ((15, 14), (15, 6), (12, 9)):
        with pytest.raises(ConfigError, match=r"choices\.num_experts: .*own 15, in multiples of 3, 9 or more"):
            ElasticSpace(config, Choices(num_experts=sizes), layers)
    config.moe_intermediate_size = 16
    with pytest.raises(ConfigError, match=r"choices\.moe_intermediate_size: got 12; allowed: multiples of 8"):
        ElasticSpace(config, Choices(moe_intermediate_size=(16, 12)), layers)
    with pytest.raises(ConfigError, match="heterogeneous: got 'num_experts'; allowed: intermediate_size"):
        Choices(heterogeneous=("num_experts",)).check()
    with pytest.raises(ValueError, match=r"num_experts: got \(15, 12\); allowed: one size for the whole model"):
        Submodel(num_experts=(15, 12)).resolve(config)
    with pytest.raises(ValueError, match="num_experts: got 6; allowed: 9 to 15, the parent's own, multiples of 3"):
        Submodel(num_experts=6).resolve(config)


def test_a_parent_without_experts_has_no_such_sizes(tmp_path):
    save_random_parent(tmp_path, 0)
    config = read_config(tmp_path)
    assert num_active_parameters(config) is None
    assert not any("expert" in name for name in Submodel().resolve(config).to_dict())
    with pytest.raises(
        ConfigError, match=r"num_experts: got \(8, 4\); allowed: null, because the parent has no experts"
    ):
        ElasticSpace(config, Choices(num_experts=(8, 4)), tuple(range(architectures.num_layers(config))))
    with pytest.raises(ValueError, match="moe_intermediate_size: got 8; allowed: nothing, this parent has no such"):
        Submodel(moe_intermediate_size=8).resolve(config)
