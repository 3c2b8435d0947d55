"""Named dimensions against brute force: every row labelled with the units that it belongs to."""

import itertools
import random

import pytest
import torch

from elastic_core.model import architectures, dims
from elastic_core.model.architectures import parameter_layout
from elastic_core.model.dims import Concat, Fixed, Product, Units, elastic_units, kept_rows, narrow, permute
from tests.support.models.parents import CONFIGS, random_config, random_elastic, random_ids, random_submodel
from tests.support.oracles.index_sets import in_groups, index_sets


def random_dim(rng: random.Random, depth: int = 0):
    kind = rng.choice(["fixed", "units", "product", "concat"]) if depth < 3 else rng.choice(["fixed", "units"])
    if kind == "fixed":
        return Fixed(rng.randint(1, 4))
    if kind == "units":
        key = rng.choice("abc")
        groups = {"a": 1, "b": 2, "c": 3}[key]
        return Units(key, {"a": 5, "b": 6, "c": 6}[key], groups)
    parts = tuple(random_dim(rng, depth + 1) for _ in range(rng.randint(1, 3)))
    return Product(parts) if kind == "product" else Concat(parts)


def label_rows(dim) -> list[frozenset]:
    """For every row the (key, unit) pairs that it belongs to."""
    if isinstance(dim, Fixed):
        return [frozenset() for _ in range(dim.size)]
    if isinstance(dim, Units):
        return [frozenset([(dim.key, i)]) for i in range(dim.size)]
    parts = [label_rows(part) for part in dim.parts]
    if isinstance(dim, Concat):
        return [label for part in parts for label in part]
    return [frozenset().union(*labels) for labels in itertools.product(*parts)]


@pytest.mark.parametrize("seed", range(40))
def test_kept_rows_are_those_whose_units_all_survive(seed):
    rng = random.Random(seed)
    dim = random_dim(rng)
    sizes = {"a": rng.randint(1, 5), "b": 2 * rng.randint(1, 3), "c": 3 * rng.randint(1, 2)}
    alive = {(key, i) for key, n, g in (("a", 5, 1), ("b", 6, 2), ("c", 6, 3)) for i in in_groups(n, sizes[key], g)}
    expected = [row for row, label in enumerate(label_rows(dim)) if label <= alive]
    rows = kept_rows(dim, sizes)
    if expected == list(range(len(expected))):
        assert rows == len(expected) and isinstance(rows, int)
    else:
        assert rows.tolist() == expected
    assert dim.count(sizes) == len(expected)
    assert dim.size == len(label_rows(dim))


@pytest.mark.parametrize("seed", range(20))
def test_permute_moves_every_row_to_the_place_of_its_units(seed):
    rng = random.Random(seed)
    dim = random_dim(rng)
    orders = {"a": torch.randperm(5, generator=torch.Generator().manual_seed(seed))}
    orders["c"] = torch.tensor([1, 0, 3, 2, 4, 5])  # inside groups of two
    place = {(key, unit): (key, i) for key, order in orders.items() for i, unit in enumerate(order.tolist())}
    labels = label_rows(dim)
    moved = permute(torch.arange(dim.size), (dim,), orders).tolist()
    # Row r now holds old row moved[r]; the places of its old units are the units of row r.
    assert sorted(moved) == list(range(dim.size))
    for row, old in enumerate(moved):
        assert {place.get(unit, unit) for unit in labels[old]} == set(labels[row])


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("seed", range(12))
def test_layout_has_the_names_and_shapes_of_transformers(seed, architecture):
    config = CONFIGS[architecture](seed)
    with torch.device("meta"):
        model = architectures.model_class(config)(config)
    reference = {name: tuple(p.shape) for name, p in model.named_parameters()}
    layout = architectures.parameter_layout(config)
    assert {name: tuple(dim.size for dim in dims_of) for name, dims_of in layout.items()} == reference
    assert {name: tuple(p.shape) for name, p in random_elastic(seed, config).named_parameters()} == reference
    assert elastic_units(layout) == architectures.units(config)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_tables_follow_the_configuration(architecture):
    """Also where a value or an entry of a list changes after they were read, and where a caller changes what it got."""
    config = CONFIGS[architecture](0)
    made = architectures.of(config)

    def double() -> None:
        config.hidden_size *= 2

    def reverse() -> None:
        if architecture == "nemotron_h":
            before = architectures.pattern(config)
            config.layers_block_type.reverse()
            assert architectures.pattern(config) != before

    for change in (lambda: None, reverse, double):
        for table in ("units", "parameter_layout"):
            getattr(architectures, table)(config).clear()
        change()
        for table in ("units", "parameter_layout"):
            assert getattr(architectures, table)(config) == getattr(made, table)(config), table


def test_only_so_many_tables_are_kept():
    for size in range(2 * architectures.MOST_TABLES):
        config = random_config(0)
        config.hidden_size = 8 + size
        assert architectures.units(config)["hidden"].size == 8 + size
    assert len(architectures._TABLES) <= architectures.MOST_TABLES


@pytest.mark.parametrize("seed", range(12))
def test_narrow_takes_the_independent_index_sets(seed):
    config = random_config(seed)
    submodel = random_submodel(config, seed, ("intermediate_size", "mamba_num_heads", "num_attention_heads"))
    sizes, dims_of = submodel.sizes(config), parameter_layout(config)
    for name, sets in index_sets(config, submodel).items():
        tensor = torch.arange(float(torch.tensor([dim.size for dim in dims_of[name]]).prod()))
        tensor = tensor.view([dim.size for dim in dims_of[name]])
        expected = tensor
        for axis, rows in enumerate(sets):
            expected = expected.index_select(axis, torch.tensor(rows))
        assert torch.equal(narrow(tensor, dims_of[name], sizes), expected), name


def test_a_prefix_is_a_view_and_anything_else_a_copy():
    tensor = torch.zeros(12, 5)
    plain = narrow(tensor, (Units("a", 12), Fixed(5)), {"a": 7})
    grouped = narrow(tensor, (Units("b", 12, groups=2), Fixed(5)), {"b": 6})
    assert plain.data_ptr() == tensor.data_ptr() and plain.shape == (7, 5)
    assert grouped.data_ptr() != tensor.data_ptr() and grouped.shape == (6, 5)


def test_row_indices_outlive_the_context_that_first_asked_for_them():
    """Index tensors are cached: made under inference mode or on the meta device, they must still serve training."""
    dim = Product((Units("a", 6, groups=2), Fixed(3)))
    dims._kept_rows.cache_clear()
    with torch.inference_mode(), torch.device("meta"):
        kept_rows(dim, {"a": 4})
    weight = torch.randn(18, requires_grad=True)
    narrow(weight, (dim,), {"a": 4}).sum().backward()
    assert weight.grad.tolist() == [1.0] * 6 + [0.0] * 3 + [1.0] * 6 + [0.0] * 3


def test_training_after_inference_mode():
    model = random_elastic(5)
    submodel, ids = random_submodel(model.config, 5, all_layers=True), random_ids(model.config, 5)
    dims._kept_rows.cache_clear()
    with torch.inference_mode():
        model(ids, submodel)
    model(ids, submodel).sum().backward()
