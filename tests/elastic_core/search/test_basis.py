"""The rotation to principal axes changes no output, and a prefix of the axes holds the most that so many can hold."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, NemotronHConfig

from benchmarks.comparison import peak_memory
from elastic_core import ElasticModel, Submodel, rank, sort_
from elastic_core.errors import UserError
from elastic_core.io.tensor_files import read_header
from elastic_core.model import architectures
from elastic_core.search.importance.ranking import Ranking
from elastic_core.search.importance.sorting import sort_directory
from tests.support.models.parents import (
    random_config,
    random_elastic,
    random_llama_config,
    random_moe_config,
    random_ratios,
    relative_error,
    save_random_parent,
)
from tests.support.oracles.calibration import batches_of

CONFIGS = {"nemotron_h": random_config, "moe": random_moe_config, "llama": random_llama_config}


def untied(config):
    """The configuration with a head of its own."""
    config = copy.deepcopy(config)
    config.tie_word_embeddings = False
    return config


def stream_norms(model):
    """transformers' own norms of the residual stream, in the order of the forward pass."""
    found = []
    for layer in model.model.layers:
        names = ("norm",) if hasattr(layer, "norm") else ("input_layernorm", "post_attention_layernorm")
        found += [getattr(layer, name) for name in names]
    return [*found, model.model.norm_f if hasattr(model.model, "norm_f") else model.model.norm]


def inputs_of_norms(model, batches):
    """The inputs of every norm, each (positions, hidden) float64, from transformers' modules."""
    seen = [[] for _ in stream_norms(model)]
    hooks = [
        norm.register_forward_pre_hook(lambda _, inputs, kept=kept: kept.append(inputs[0].flatten(0, 1).double()))
        for norm, kept in zip(stream_norms(model), seen, strict=True)
    ]
    with torch.no_grad():
        for ids in batches:
            model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(kept) for kept in seen]


def rms(x):
    return x.square().mean(-1).sqrt()


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("seed", range(8))
def test_the_rotated_model_computes_the_same_as_the_parent(tmp_path, seed, architecture):
    save_random_parent(tmp_path / "parent", seed, untied(CONFIGS[architecture](seed)))
    model = ElasticModel.from_pretrained(tmp_path / "parent")
    batches = batches_of(model.config, seed)
    parent = AutoModelForCausalLM.from_pretrained(tmp_path / "parent", experts_implementation="eager").eval()
    with torch.no_grad():
        before = parent(batches[0], use_cache=False).logits
        ranking = rank(model, batches, depth_method="one_shot_nmse")
        sort_(model, ranking).save_pretrained(tmp_path / "sorted")
        assert relative_error(model(batches[0]), before) < 1e-5
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sorted", experts_implementation="eager").eval()
        assert relative_error(loaded(batches[0], use_cache=False).logits, before) < 1e-5
    assert all(torch.equal(norm.weight, torch.ones_like(norm.weight)) for norm in stream_norms(loaded))
    identity = torch.eye(model.config.hidden_size, dtype=torch.float64)
    assert relative_error(ranking.axes.T @ ranking.axes, identity) < 1e-12
    # The energy of the channels, from transformers' modules, falls, and no directions of the parent hold more.
    hats = torch.cat([x / rms(x)[:, None] for x in inputs_of_norms(loaded, batches)])
    energy = hats.square().sum(0)
    assert (energy.diff() <= 1e-4 * energy[0]).all()
    hats = torch.cat([x / rms(x)[:, None] for x in inputs_of_norms(parent, batches)])
    most = torch.linalg.svdvals(hats).square()[: len(energy)]
    assert relative_error(energy.cumsum(0)[: len(most)], most.cumsum(0)) < 1e-4


@pytest.mark.parametrize("basis", ["principal", "channels"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_norm_ratios_are_those_of_transformers_modules(tmp_path, architecture, basis):
    save_random_parent(tmp_path / "parent", 3, untied(CONFIGS[architecture](3)))
    model = ElasticModel.from_pretrained(tmp_path / "parent")
    batches = batches_of(model.config, 3)
    ranking = rank(model, batches, basis=basis, depth_method="one_shot_nmse", depth_batches=2)
    sort_(model, ranking).save_pretrained(tmp_path / "sorted")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sorted", experts_implementation="eager").eval()
    assert list(ranking.norm_ratios) == architectures.norm_names(model.config)
    inputs = inputs_of_norms(loaded, batches[:2])
    for x, ratios in zip(inputs, ranking.norm_ratios.values(), strict=True):
        expected = torch.stack([(rms(x[:, :k]) / rms(x)).mean() for k in range(1, x.shape[1] + 1)])
        assert relative_error(ratios.double(), expected) < 1e-4
        assert abs(ratios[-1] - 1) < 1e-6


def test_a_slice_has_the_gains_of_its_size():
    model = random_elastic(2)
    batches = batches_of(model.config, 2)
    sort_(model, ranking := rank(model, batches, depth_method="one_shot_nmse"))
    submodel = Submodel(hidden_size=model.config.hidden_size // 2)
    by_hand = copy.deepcopy(model)
    by_hand.norm_gains = None
    with torch.no_grad():
        for name, ratios in ranking.norm_ratios.items():
            by_hand.get_parameter(name).mul_(ratios[submodel.hidden_size - 1])
        assert relative_error(model(batches[0], submodel), by_hand(batches[0], submodel)) < 1e-6
        assert torch.equal(model(batches[0]), model(batches[0], model.full))


def test_without_private_norms_all_sizes_share_the_gains():
    model = random_elastic(2)
    ranking = rank(model, batches_of(model.config, 2), private_norms=False, depth_method="one_shot_nmse")
    assert ranking.norm_ratios == {} and sort_(model, ranking).norm_gains is None


@pytest.mark.parametrize("seed", range(2))
def test_tied_embeddings_are_refused_until_they_are_untied(tmp_path, seed):
    config = random_llama_config(seed)
    config.tie_word_embeddings = True
    save_random_parent(tmp_path / "parent", seed, config)
    model, batches = ElasticModel.from_pretrained(tmp_path / "parent"), batches_of(config, seed)
    with pytest.raises(UserError, match="untie_head"):
        rank(model, batches)
    own = architectures.with_own_head(model.config)
    with torch.no_grad():
        before = model(batches[0])
        model = ElasticModel.from_pretrained(tmp_path / "parent", config=own)
        assert torch.equal(model(batches[0]), before)
        sort_(model, rank(model, batches, depth_method="one_shot_nmse"))
        assert relative_error(model(batches[0]), before) < 1e-5
    with pytest.raises(UserError, match="not tied"):
        architectures.with_own_head(own)


def test_a_basis_of_another_size_is_refused():
    model = random_elastic(2)
    with pytest.raises(UserError, match="a basis of 3 × 3 numbers"):
        sort_(model, Ranking({}, {}, tuple(range(len(model.model.layers))), axes=torch.eye(3, dtype=torch.float64)))


def test_norm_ratios_of_another_model_are_refused():
    model = random_elastic(2)
    depth = tuple(range(len(model.model.layers)))
    ratios = random_ratios(model.config).ratios
    name = next(iter(ratios))
    unknown = {name.replace("layers.0", "layers.99"): ratios[name]}
    for change, words in ((unknown, "of another model: .*layers.99"), ({name: ratios[name][1:]}, "not 32 finite")):
        found = {key: value for key, value in ratios.items() if key != name} | change
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(UserError, match=words):
            sort_(model, Ranking({}, {}, depth, norm_ratios=found))
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def wide_config(hidden: int, layers: int):
    """MLP, MLP, attention, and so on: matrices large enough for blocks of rows and for sums in several orders."""
    return NemotronHConfig(
        vocab_size=64,
        hidden_size=hidden,
        layers_block_type=["mlp", "mlp", "full_attention"] * (layers // 3),
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=4 * hidden,
    )


def write_wide(directory, hidden: int, layers: int):
    """A parent and a ranking, also written as `directory`/parent and /ranking.json."""
    model = random_elastic(0, wide_config(hidden, layers))
    model.save_pretrained(directory / "parent")
    orders = {f"ffn.{i}": torch.randperm(4 * hidden) for i in range(layers) if i % 3 < 2}
    axes = torch.linalg.qr(torch.randn(hidden, hidden, dtype=torch.float64)).Q
    ranking = Ranking({}, orders, tuple(range(layers)), axes=axes)
    ranking.save(directory / "ranking.json")
    return model, ranking


def test_a_ranking_sorts_to_the_same_bits_once_it_was_saved(tmp_path):
    """The axes of a decomposition are column by column in memory, those of a file row by row. In float64 no rounding
    to the weights' type hides another order of sums."""
    model, ranking = write_wide(tmp_path, 512, 3)
    saved = Ranking.load(tmp_path / "ranking.json")
    assert ranking.axes.stride() != saved.axes.stride() and torch.equal(ranking.axes, saved.axes)
    before, after = (sort_(copy.deepcopy(model).double(), found) for found in (ranking, saved))
    for (name, expected), found in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(found, expected), name


SORT = """
from elastic_core.search.importance.ranking import Ranking
from elastic_core.search.importance.sorting import sort_directory
sort_directory("{0}/parent", "{0}/sorted", Ranking.load("{0}/ranking.json"))
"""


def test_a_directory_is_sorted_tensor_by_tensor(tmp_path):
    """The same bits as in memory, and memory for a few tensors instead of for the model."""
    write_wide(tmp_path / "tiny", 64, 3)  # sorted first, so that libraries are not counted
    model, ranking = write_wide(tmp_path, 512, 36)
    before, peak = peak_memory(SORT.format(tmp_path / "tiny"), SORT.format(tmp_path))
    assert peak - before < sum(4 * p.numel() for p in model.parameters()) / 2  # a fifth, and what systems add
    written = ElasticModel.from_pretrained(tmp_path / "sorted")
    for (name, expected), found in zip(sort_(model, ranking).named_parameters(), written.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_only_rotated_weights_of_a_bfloat16_directory_become_float32(tmp_path):
    """A permutation rounds nothing. A rotation of bfloat16 weights is not rounded to bfloat16 again."""
    model = random_elastic(2).bfloat16()
    model.save_pretrained(tmp_path / "parent")
    ids = batches_of(model.config, 2)
    for basis, dtype in (("channels", torch.bfloat16), ("principal", torch.float32)):
        parent = ElasticModel.from_pretrained(tmp_path / "parent")
        ranking = rank(parent, ids, basis=basis, depth_method="one_shot_nmse")
        sort_directory(tmp_path / "parent", tmp_path / basis, ranking)
        assert {entry.dtype for entry in entries(tmp_path / basis)} == {dtype}
        found, expected = ElasticModel.from_pretrained(tmp_path / basis), sort_(parent, ranking)
        assert all(torch.equal(*pair) for pair in zip(found.parameters(), expected.parameters(), strict=True))
        assert found.norm_gains.ratios.keys() == ranking.norm_ratios.keys()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / basis)
        assert loaded.dtype == dtype


def entries(directory):
    return [stored.entry for stored in read_header(directory / "model.safetensors").values()]
