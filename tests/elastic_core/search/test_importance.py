"""Importance against naive computations: activations hooked out of transformers, layers removed one by one."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, NemotronHConfig, NemotronHForCausalLM

from elastic_core import ElasticModel, Submodel, rank, sort_
from elastic_core.data.loader import IGNORED_LABEL, Batch
from elastic_core.errors import UserError
from elastic_core.model.dims import elastic_units
from elastic_core.search.importance import basis, depth
from elastic_core.search.importance import depth as depth_ranking
from elastic_core.search.importance.calibration import calibration_texts
from elastic_core.search.importance.depth import LogitError, rank_layers
from elastic_core.search.importance.methods import DEPTH_METHODS
from elastic_core.search.importance.ranking import Ranking
from elastic_core.search.importance.state import RankingState
from elastic_core.search.importance.widths import score_mamba
from tests.support.marks import thorough
from tests.support.models.parents import (
    CONFIGS,
    random_config,
    random_elastic,
    random_ids,
    random_llama_config,
    random_moe_config,
    randomise,
    relative_error,
    save_random_parent,
)
from tests.support.oracles.calibration import AGGREGATE, batches_of
from tests.support.oracles.index_sets import in_groups

PAPERS = {"measure": "projection", "aggregation": "l1"}  # eqs. 2 to 4 as the paper has them

# Widths


def naive_width_scores(reference, batches, aggregation):
    """Eqs. 1–4 from the activations of transformers' own modules."""
    config, seen = reference.config, {}

    def keep(key):
        return lambda _, __, out: seen.setdefault(key, []).append(out.detach().double().flatten(0, 1))

    kinds = dict(enumerate(config.layers_block_type))
    for i, layer in enumerate(reference.model.layers):
        layer.norm.register_forward_hook(keep("hidden"))
        part = {"mlp": "up_proj", "full_attention": "q_proj", "linear_attention": "in_proj"}[kinds[i]]
        getattr(layer.mixer, part).register_forward_hook(keep(i))
    reference.model.norm_f.register_forward_hook(keep("hidden"))
    with torch.no_grad():
        for ids in batches:
            reference(ids, use_cache=False)
    seen = {key: torch.cat(values) for key, values in seen.items()}
    scores = {"hidden": AGGREGATE[aggregation](seen.pop("hidden"))}
    for i, activation in seen.items():
        if kinds[i] == "mlp":
            scores[f"ffn.{i}"] = AGGREGATE[aggregation](activation)
        elif kinds[i] == "full_attention":
            heads = [head.square().sum(-1).sqrt() for head in activation.split(config.head_dim, -1)]
            scores[f"attention_heads.{i}"] = AGGREGATE[aggregation](torch.stack(heads, -1))
        else:
            H, P = config.mamba_num_heads, config.mamba_head_dim
            s = AGGREGATE[aggregation](activation[:, H * P : 2 * H * P]).view(H, P)
            channels = torch.stack([s[:, d].square().sum().sqrt() for d in range(P)])
            best = sorted(range(P), key=lambda d: -channels[d])[: max(1, P // 2)]
            scores[f"mamba_channels.{i}"] = channels
            scores[f"mamba_heads.{i}"] = torch.stack([s[h, best].square().sum().sqrt() for h in range(H)])
    return scores


@pytest.mark.parametrize("aggregation", AGGREGATE)
@pytest.mark.parametrize("seed", range(5))
def test_width_scores_equal_the_naive_ones(seed, aggregation):
    reference = randomise(NemotronHForCausalLM(random_config(seed)), seed).eval()
    model = ElasticModel(reference.config)
    model.load_state_dict(reference.state_dict())
    batches = batches_of(reference.config, seed)
    options = {"basis": "channels", "depth_method": "one_shot_nmse"}
    ranking = rank(model, batches, measure="projection", aggregation=aggregation, **options)
    naive = naive_width_scores(reference, batches, aggregation)
    assert ranking.scores.keys() == naive.keys() == ranking.orders.keys()
    for key, scores in naive.items():
        assert relative_error(ranking.scores[key], scores) < 1e-5, key


@pytest.mark.parametrize("aggregation", AGGREGATE)
@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("seed", range(2))
def test_output_norms_are_norms_of_what_transformers_layers_add(tmp_path, seed, architecture, aggregation):
    """Unit by unit, from what enters and leaves the last projection of transformers' own modules."""
    save_random_parent(tmp_path / "parent", seed, CONFIGS[architecture](seed))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "parent").eval()
    model, seen = ElasticModel.from_pretrained(tmp_path / "parent"), {}
    batches, axes = (
        batches_of(model.config, seed),
        {"down_proj": "ffn", "o_proj": "attention_heads", "out_proj": "mamba"},
    )
    for name, module in reference.named_modules():
        axis = axes.get(name.split(".")[-1])
        if axis:
            found = seen.setdefault(f"{axis}.{name.split('.')[2]}", (module.weight.detach().double(), []))[1]
            module.register_forward_hook(
                lambda _, inputs, __, found=found: found.append(inputs[0].double().flatten(0, 1))
            )
    with torch.no_grad():
        for ids in batches:
            reference(ids, use_cache=False)
    options = {"aggregation": aggregation, "basis": "channels", "depth_method": "one_shot_nmse"}
    ranking = rank(model, batches, measure="output_norm", **options)
    by_projection = rank(model, batches, measure="projection", **options).scores
    assert torch.equal(ranking.scores["hidden"], by_projection["hidden"])
    units = elastic_units(model.layout)
    for key, (weight, inputs) in seen.items():
        inputs = torch.cat(inputs)
        layer = key.split(".")[1]
        num_units = weight.shape[1] if key.startswith("mamba") else units[key].size
        pairs = zip(inputs.chunk(num_units, 1), weight.chunk(num_units, 1), strict=True)
        scores = AGGREGATE[aggregation](torch.stack([(x @ part.T).norm(dim=1) for x, part in pairs], 1))
        if key.startswith("mamba"):
            expected = score_mamba(scores.view(units[f"mamba_heads.{layer}"].size, -1))
            found = ranking.scores[f"mamba_heads.{layer}"], ranking.scores[f"mamba_channels.{layer}"]
        else:
            expected, found = [scores], [ranking.scores[key]]
        for ours, theirs in zip(found, expected, strict=True):
            assert relative_error(ours, theirs) < 1e-5, key
        assert relative_error(found[0], by_projection.get(key, by_projection.get(f"mamba_heads.{layer}"))) > 1e-3
    assert len(seen) == len(
        {key.split(".")[0].split("_")[0] + key.split(".")[1] for key in ranking.scores if "." in key}
    )


# Sorting


def groups_of(config, key):
    fields = {"mamba_heads": "n_groups", "attention_heads": "num_key_value_heads"}
    axis = key.split(".")[0]
    return getattr(config, fields[axis]) if axis in fields else 1


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("seed", range(8))
def test_sorting_changes_order_and_nothing_else(tmp_path, seed, architecture):
    options = PAPERS if seed % 2 else {}  # by the paper's equations, and by the defaults
    save_random_parent(tmp_path / "parent", seed, CONFIGS[architecture](seed))
    model = ElasticModel.from_pretrained(tmp_path / "parent")
    config, batches = model.config, batches_of(model.config, seed)
    with torch.no_grad():
        before = model(batches[0])
        ranking = rank(model, batches, basis="channels", depth_method="one_shot_nmse", **options)
        assert sort_(model, ranking) is model
        assert relative_error(model(batches[0]), before) < 1e-5
        model.save_pretrained(tmp_path / "sorted")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sorted")
        assert relative_error(loaded(batches[0], use_cache=False).logits, before) < 1e-5
    again = rank(model, batches, basis="channels", depth_method="one_shot_nmse", **options)
    assert again.depth == ranking.depth  # layers do not move
    moved = 0
    for key, scores in again.scores.items():
        assert relative_error(scores, ranking.scores[key][ranking.orders[key]]) < 1e-5, key
        assert torch.equal(again.orders[key], torch.arange(len(scores))), key
        for group in scores.view(groups_of(config, key), -1):
            assert (group.diff() <= 0).all(), key
        moved += not torch.equal(ranking.orders[key], again.orders[key])
    assert moved > len(again.scores) / 2


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("seed", range(4))
def test_a_slice_of_the_sorted_model_keeps_the_best_units(seed, architecture):
    """A slice of the sorted model computes what the model computed before with a mask of the highest scores."""
    model = random_elastic(seed, CONFIGS[architecture](seed)).double()
    config, batches = model.config, batches_of(model.config, seed)
    options = {"basis": "channels", "private_norms": False} | (PAPERS if seed % 2 else {})
    ranking = rank(model, batches, depth_method="one_shot_nmse", **options)
    submodel = Submodel(
        hidden_size=config.hidden_size // 2,
        intermediate_size=config.intermediate_size // 3,
        num_attention_heads=config.num_key_value_heads,
    )
    if architecture == "nemotron_h":
        submodel = replace(submodel, mamba_num_heads=config.n_groups, mamba_head_dim=config.mamba_head_dim // 2)
    gates = {}
    for key, size in submodel.sizes(config).items():
        groups, scores = groups_of(config, key), ranking.scores[key]
        gates[key] = torch.zeros_like(scores)
        for j in range(groups):
            members = [i for i in range(len(scores)) if i // (len(scores) // groups) == j]
            gates[key][sorted(members, key=lambda i, s=scores: -s[i])[: size // groups]] = 1
    with torch.no_grad():
        masked = model(batches[0], gates=gates)
        assert relative_error(sort_(model, ranking)(batches[0], submodel), masked) < 1e-12


def test_rankings_are_saved_and_loaded_exactly(tmp_path):
    model = random_elastic(1)
    ranking = rank(model, batches_of(model.config, 1))
    ranking.save(tmp_path / "ranking.json")
    loaded = Ranking.load(tmp_path / "ranking.json")
    assert loaded.depth == ranking.depth and loaded.depth_scores == ranking.depth_scores
    assert torch.equal(loaded.axes, ranking.axes)
    for name in ("scores", "orders", "norm_ratios"):
        ours, theirs = getattr(ranking, name), getattr(loaded, name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key])


def test_impossible_orders_are_refused():
    model = random_elastic(5)
    config, kinds = model.config, model.config.layers_block_type
    heads = f"mamba_heads.{kinds.index('linear_attention')}"
    assert config.n_groups > 1
    before = [p.clone() for p in model.parameters()]
    for orders, words in [
        ({"hidden": torch.zeros(config.hidden_size, dtype=torch.int64)}, "'hidden' is not a permutation"),
        ({"hidden": torch.arange(config.hidden_size - 1)}, "'hidden' is not a permutation"),
        ({heads: torch.arange(config.mamba_num_heads).flip(0)}, "within the groups"),
        ({"ffn.99": torch.arange(3)}, "'ffn.99' is not in this model"),
    ]:
        with pytest.raises(ValueError, match=words):
            sort_(model, Ranking({}, orders, ()))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_arguments_are_checked_and_the_mode_is_restored():
    model = random_elastic(0)
    batches, layers = batches_of(model.config, 0), len(model.config.layers_block_type)
    for options, words in [
        ({"aggregation": "max"}, "aggregation: got 'max'.*l1"),
        ({"measure": "magic"}, "measure: got 'magic'.*output_norm, projection"),
        ({"depth_method": "magic"}, "depth_method: got 'magic'.*iterative_nmse"),
        ({"min_depth": 0}, f"min_depth: got 0.*1 to {layers}"),
        ({"min_depth": layers + 1}, "min_depth"),
    ]:
        with pytest.raises(ValueError, match=words):
            rank(model, batches, **options)
    for bad in ([], [torch.zeros(2, 5)], [torch.zeros(5, dtype=torch.int64)], [torch.zeros(2, 1, dtype=torch.int64)]):
        with pytest.raises(ValueError, match="batches"):
            rank(model, bad)
    model.train()
    rank(model, iter(batches))
    assert model.training and all(p.grad is None for p in model.parameters())


# Depth


def naive_nmse(model, batches, kept, layer):
    """Eq. 5 from whole logits; M_full is always the intact model's."""
    error = scale = 0.0
    for ids in batches:
        full, without = model(ids), model(ids, Submodel(kept_layers=tuple(i for i in kept if i != layer)))
        error, scale = error + (full - without).square().sum().item(), scale + full.square().sum().item()
    return error / scale


def deep(seed, layers=7):
    pattern = "".join(itertools.islice(itertools.cycle("M-*-"), layers))
    values = random_config(seed).to_dict() | {"layers_block_type": NemotronHConfig._pattern_to_list(pattern)}
    return random_elastic(seed, NemotronHConfig(**values)).double()


def count_layer_calls(model, function):
    calls, handles = [], []
    for layer in model.model.layers:
        handles.append(layer.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0]))))
    result = function()
    for handle in handles:
        handle.remove()
    return result, sum(calls)  # times sequences


@pytest.mark.parametrize(("seed", "min_depth"), [(0, 1), thorough(1, 1), (2, 3), thorough(3, 1), (4, 6)])
@torch.no_grad()
def test_iterative_ranking_is_the_naive_loop(seed, min_depth):
    model = deep(seed)
    batches = batches_of(model.config, seed, count=4, length=7)
    kept, removed, scores, naive_calls = list(range(7)), [], {}, 0
    for _ in range(7 - min_depth):
        # With one layer left no layer is left to compare with; the library's floor is min_depth ≥ 1.
        errors = {layer: naive_nmse(model, batches, kept, layer) for layer in kept}
        naive_calls += 2 * len(batches) * len(kept) * (len(kept) - 1)
        worst = min(errors, key=errors.get)
        kept.remove(worst)
        removed.append(worst)
        scores[worst] = errors[worst]
    (order, ours), calls = count_layer_calls(model, lambda: rank_layers(model, batches, "iterative_nmse", min_depth))
    assert order == (*kept, *removed[::-1])
    assert ours.keys() == scores.keys()
    for layer, score in scores.items():
        assert abs(ours[layer] / score - 1) < 1e-9
    # Prefix caching alone: every batch walks the stack once and every candidate its suffix.
    cached = 2 * len(batches) * (7 + sum(n + n * (n - 1) // 2 for n in range(min_depth + 1, 8)))
    assert calls < cached  # so candidates were given up before the last batch
    if min_depth < 6:
        assert calls < naive_calls


@torch.no_grad()
def test_candidates_are_given_up_as_soon_as_they_have_lost(monkeypatch):
    """No candidate sees another batch once its partial error has passed the complete error of the first's winner."""
    evaluate, evaluated, needed, whole = LogitError.__call__, [], 0, 0
    monkeypatch.setattr(LogitError, "__call__", lambda *args: evaluated.append(1) or evaluate(*args))
    for seed in range(2):
        model, kept = deep(seed, layers=6), list(range(6))
        batches = batches_of(model.config, seed, count=5, length=3)
        order, _ = rank_layers(model, batches, "iterative_nmse", 1)
        pieces = [ids[i : i + 1] for ids in batches for i in range(2)]  # so that there are eight, or more
        for removed in order[:0:-1]:
            errors = {layer: [naive_nmse(model, [ids], kept, layer) for ids in pieces] for layer in kept}
            scales = [model(ids).square().sum().item() for ids in pieces]
            sums = {layer: [e * s for e, s in zip(row, scales, strict=True)] for layer, row in errors.items()}
            first = min(sums, key=lambda layer: sums[layer][0])
            for layer, row in sums.items():
                alive = [layer == first or sum(row[:b]) <= sum(sums[first]) for b in range(len(row))]
                needed, whole = needed + sum(alive), whole + len(row)
            kept.remove(removed)
    assert len(evaluated) == needed < 0.8 * whole


@torch.no_grad()
def test_states_that_are_not_held_are_computed_again(monkeypatch):
    model = deep(3, layers=5)
    batches = batches_of(model.config, 3, count=9)
    expected, held_calls = count_layer_calls(model, lambda: rank_layers(model, batches))
    one = batches[0].numel() * model.config.hidden_size * 8
    for held in (0, 4 * one):
        monkeypatch.setattr(depth_ranking, "HELD_BYTES", held)
        found, calls = count_layer_calls(model, lambda: rank_layers(model, batches))
        assert found == expected and calls > held_calls
        error = LogitError(model, calibration_texts(batches), lambda sums: sums)
        assert len(error._held) == held // one


@torch.no_grad()
def test_a_candidate_that_looks_best_at_first_can_lose():
    """The first batch's winner is not the winner over all of them: giving up early must still find the right one."""
    found = 0
    for seed in range(12):
        model = deep(seed, layers=5)
        batches = [random_ids(model.config, seed, (1, 2)), *batches_of(model.config, seed + 20, count=2)]
        first = {layer: naive_nmse(model, batches[:1], range(5), layer) for layer in range(5)}
        every = {layer: naive_nmse(model, batches, range(5), layer) for layer in range(5)}
        order, scores = rank_layers(model, batches, "iterative_nmse", 4)
        best = min(every, key=every.get)
        assert order[-1] == best and abs(scores[best] / every[best] - 1) < 1e-9
        found += best != min(first, key=first.get)
    assert found > 0


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_one_shot_rankings(seed):
    model = deep(seed)
    batches = batches_of(model.config, seed)
    order, scores = rank_layers(model, batches, "one_shot_nmse")
    naive = {layer: naive_nmse(model, batches, range(7), layer) for layer in range(7)}
    assert order == tuple(sorted(naive, key=lambda layer: -naive[layer]))
    assert all(abs(scores[layer] / naive[layer] - 1) < 1e-9 for layer in naive)
    order, scores = rank_layers(model, batches, "one_shot_perplexity")
    for layer in range(7):
        losses = [
            F.cross_entropy(
                model(ids, Submodel(kept_layers=tuple(i for i in range(7) if i != layer)))[:, :-1].flatten(0, 1),
                ids[:, 1:].flatten(),
                reduction="sum",
            )
            for ids in batches
        ]
        assert abs(scores[layer] / (sum(losses).item() / (3 * 2 * 10)) - 1) < 1e-9
    assert order == tuple(sorted(scores, key=lambda layer: -scores[layer]))


class Stopped(BaseException):
    """As a kill: nothing of ours catches it."""


@pytest.mark.parametrize("method", ["iterative_nmse", "one_shot_nmse", "one_shot_perplexity"])
def test_a_stopped_ranking_goes_on(method):
    """Stopped at every moment at which something was saved, it ends at the same bits, and computes nothing twice."""
    model, kept, saves = deep(1), {}, 0
    batches = batches_of(model.config, 1)
    options = {"depth_method": method, "min_depth": 3}
    whole, calls = count_layer_calls(model, lambda: rank(model, batches, **options))

    def save(name, data):
        nonlocal saves
        saves += 1
        kept[name] = data
        raise Stopped

    def resume():
        while True:
            try:
                return rank(model, batches, **options, state=RankingState(kept.get, save))
            except Stopped:
                continue

    ranking, more_calls = count_layer_calls(model, resume)
    assert saves >= len(batches) + 4
    assert ranking.depth == whole.depth and ranking.depth_scores == whole.depth_scores
    assert all(torch.equal(ranking.scores[key], score) for key, score in whole.scores.items())
    again, last_calls = count_layer_calls(model, lambda: rank(model, batches, **options, state=RankingState(kept.get)))
    assert again.depth == whole.depth
    if method == "one_shot_perplexity":
        assert last_calls == 0 and more_calls == calls
    else:  # the full model's hidden states are not kept
        assert last_calls < calls / 2


def test_scores_of_other_batches_are_not_taken_over():
    """Another number of processes splits a batch into others; only the sums of the widths stay the same."""
    model, kept = deep(1), {}
    batches = batches_of(model.config, 1)
    rank(model, batches, state=RankingState(kept.get, kept.__setitem__))
    halves = [ids[:1] for ids in batches]
    found = rank(model, halves, state=RankingState(kept.get, kept.__setitem__))
    whole = rank(model, halves)
    assert found.depth == whole.depth and found.depth_scores == whole.depth_scores


def test_progress_is_told():
    model, told = random_elastic(0), []
    layers = len(model.config.layers_block_type)
    rank(model, batches_of(model.config, 0), progress=lambda *event: told.append(event))
    assert [event for event in told if event[0] == "widths"] == [("widths", i, 3) for i in (1, 2, 3)]
    depth = [event for event in told if event[0] == "depth"]
    assert depth == [("depth", i, layers - 1) for i in range(1, layers)]


def test_units_stay_inside_their_groups():
    model = random_elastic(5)
    ranking = rank(model, batches_of(model.config, 5), depth_method="one_shot_nmse")
    for key, order in ranking.orders.items():
        groups = groups_of(model.config, key)
        for kept in range(groups, len(order) + 1, groups):  # any prefix holds as many of every group
            chosen = order[in_groups(len(order), kept, groups)]
            assert (torch.bincount(chosen // (len(order) // groups), minlength=groups) == kept // groups).all()


@pytest.mark.parametrize("depth_method", ["iterative_nmse", "one_shot_nmse", "one_shot_perplexity"])
@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda model: [p.zero_() for p in model.parameters()], "rank: all activations of the model are zero"),
        (lambda model: model.lm_head.weight.zero_(), r"rank: the head of the model is zero"),
        (lambda model: model.lm_head.weight.fill_(float("nan")), "rank: the .*(logits|loss).* not finite"),
        (lambda model: model.model.final_norm.weight.fill_(float("inf")), r"rank: the scores of hidden are not finite"),
    ],
)  # fmt: skip
def test_a_model_without_finite_or_different_logits_is_refused(depth_method, damage, message):
    model = random_elastic(0)
    with torch.no_grad():
        damage(model)
    with pytest.raises(UserError, match=message):
        rank(model, [random_ids(model.config, 0)], depth_method=depth_method)


@pytest.mark.parametrize("method", ["iterative_nmse", "one_shot_nmse"])
def test_a_layer_without_which_nothing_is_finite_is_the_most_important(method, monkeypatch):
    model, error = random_elastic(0), depth.LogitError.__call__

    def without_first(self, batch, full, x, layers):
        is_first = torch.equal(x, self.model.model.embed(self.texts[batch].input_ids, self.sliced))
        return error(self, batch, full, x, layers) * (torch.nan if is_first else 1)

    monkeypatch.setattr(depth.LogitError, "__call__", without_first)
    assert rank(model, batches_of(model.config, 0), depth_method=method).depth[0] == 0


@pytest.mark.parametrize("method", DEPTH_METHODS)
@pytest.mark.parametrize("kind", [random_config, random_moe_config, random_llama_config])
def test_packed_documents_are_ranked_as_each_alone(kind, method):
    """Documents do not see each other, and padding does not count."""
    config = kind(1)
    model, generator = random_elastic(1, config), torch.Generator().manual_seed(0)
    lengths = [[5, 2, 6], [9], [3, 3, 4]]  # of rows of 13 positions: two have padding
    ids, labels = torch.zeros(3, 13, dtype=torch.int64), torch.full((3, 13), IGNORED_LABEL)
    numbers, alone = torch.full((3, 13), 13), []
    for row, parts in enumerate(lengths):
        start = 0
        for number, length in enumerate(parts):
            tokens = torch.randint(0, config.vocab_size, (length,), generator=generator)
            part = slice(start, start + length)
            ids[row, part], numbers[row, part], start = tokens, number, start + length
            labels[row, start - length : start - 1] = tokens[1:]
            alone.append(tokens[None])
    options = {"depth_method": method, "measure": "output_norm"}
    packed, single = rank(model, [Batch(ids, labels, numbers)], **options), rank(model, alone, **options)
    for key, scores in single.scores.items():
        assert relative_error(packed.scores[key], scores) < 1e-5, key
    assert packed.depth == single.depth
    assert packed.depth_scores == pytest.approx(single.depth_scores, rel=1e-4)


@pytest.mark.parametrize("kind", [random_config, random_moe_config])
@pytest.mark.parametrize("measure", ["output_norm", "projection"])
def test_sums_in_small_parts_are_the_same_sums(monkeypatch, kind, measure):
    """As where activations and head of a large model are not in float64 at one time."""
    model = random_elastic(1, kind(1))
    batches, options = batches_of(model.config, 1), {"measure": measure, "depth_method": "one_shot_nmse"}
    whole = rank(model, batches, **options)
    monkeypatch.setattr(basis, "ACTIVATION_VALUES", 100)
    monkeypatch.setattr(depth_ranking, "HEAD_VALUES", 100)
    parts = rank(model, batches, **options)
    for key, score in whole.scores.items():
        assert relative_error(parts.scores[key], score) < 1e-12, key
    for key, ratios in whole.norm_ratios.items():
        assert relative_error(parts.norm_ratios[key], ratios) < 1e-6, key
    assert parts.depth_scores == pytest.approx(whole.depth_scores, rel=1e-12)
    assert relative_error(parts.axes.abs(), whole.axes.abs()) < 1e-6


def test_sums_are_saved_no_more_often_than_asked():
    """A ranking that has waited too short saves its sums at the end of the widths, and is the same."""
    model, saved = random_elastic(1), []
    batches, kept = batches_of(model.config, 1), {}

    def save(name, data):
        saved.append(name)
        kept[name] = data

    whole = rank(model, batches)
    for seconds, times in ((0.0, len(batches)), (3600.0, 1)):
        saved.clear()
        kept.clear()
        ranking = rank(model, batches, state=RankingState(lambda name: None, save, seconds=seconds))
        assert saved.count("widths.state") == times
        again = rank(model, batches, state=RankingState(kept.get))
        for found in (ranking, again):
            assert all(torch.equal(found.scores[key], score) for key, score in whole.scores.items())
