"""Many models in one: every budget on one set of weights gives what the extracted directory gives."""

import dataclasses
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from elastic_core import Submodel, extract
from elastic_core.errors import UserError
from elastic_core.export import elastic_checkpoint
from elastic_core.export.conversation import part_of_cache
from elastic_core.export.nested import NestedModel, nested_chain
from elastic_core.model import architectures, hf
from elastic_core.search.selection import Member
from tests.support.models.parents import (
    CONFIGS,
    random_config,
    random_ids,
    random_submodel,
    relative_error,
    save_random_parent,
)

GREEDY = {"do_sample": False, "max_new_tokens": 5}
PER_LAYER = ("intermediate_size", "mamba_num_heads")


def half(config, submodel: Submodel) -> Submodel:
    """About half of every width of a submodel, in the steps that the parent's groups allow."""
    steps = {"num_attention_heads": config.num_key_value_heads}
    if config.model_type == "nemotron_h":
        steps["mamba_num_heads"] = config.n_groups
    else:
        steps["hidden_size"] = config.num_attention_heads  # of which all smaller numbers here are divisors

    def smaller(size: int, step: int) -> int:
        return max(step, size // 2 // step * step)

    values = {name: value for name, value in dataclasses.asdict(submodel).items() if value is not None}
    for name in values.keys() - {"kept_layers"}:
        size, step = values[name], steps.get(name, 1)
        values[name] = tuple(smaller(s, step) for s in size) if isinstance(size, tuple) else smaller(size, step)
    return Submodel(**values).resolve(config)


def make_family(directory, seed: int, heterogeneous=(), architecture: str = "nemotron_h") -> dict[str, Submodel]:
    """A random parent with three nested budgets and one in between, the smallest without the last layer."""
    config = CONFIGS[architecture](seed)
    config.time_step_min, config.eos_token_id = 1e-30, None  # see tests/elastic_core/export/test_extract.py
    config.time_step_limit = (0.0, math.inf)
    save_random_parent(directory, seed, config)
    config = hf.read_config(directory)
    big = random_submodel(config, seed, heterogeneous, all_layers=True).resolve(config)
    small = half(config, big)
    kept = small.kept_layers[:-1] if architectures.pattern(config)[-1] != "*" else small.kept_layers
    small = dataclasses.replace(small, kept_layers=kept).resolve(config)
    budgets = {"full": Submodel().resolve(config), "big": big, "small": small}
    between = dataclasses.replace(big, hidden_size=small.hidden_size)
    elastic_checkpoint.write(directory, config, {name: Member(1.0, s) for name, s in budgets.items()}, [between])
    return budgets


@pytest.fixture(
    scope="module",
    params=[(1, ()), (4, ()), (7, PER_LAYER), (9, ()), (2, (), "llama"), (3, (), "llama"), (6, (), "llama")],
    ids=lambda param: " ".join(map(str, ("seed", param[0], *param[2:]))),
)
def family(request, tmp_path_factory):
    """A family's directory, its budgets, the model that serves them all, and the extracted ones."""
    directory = tmp_path_factory.mktemp("family")
    budgets = make_family(directory / "elastic", *request.param)
    extracted = {}
    for name in budgets:
        extract(directory / "elastic", name, directory / name)
        extracted[name] = AutoModelForCausalLM.from_pretrained(directory / name, trust_remote_code=True).eval()
    return NestedModel.from_pretrained(directory / "elastic"), budgets, extracted


def test_every_budget_computes_what_its_extracted_model_does(family):
    model, budgets, extracted = family
    ids = random_ids(model.config, 3)
    for name in budgets:
        with torch.no_grad():
            logits, expected = model.at(name)(ids).logits, extracted[name](ids).logits
        assert relative_error(logits, expected) < 1e-5  # float32, rows in another order
        options = GREEDY | {"attention_mask": torch.ones_like(ids)}
        assert torch.equal(model.generate(ids, name, **options), extracted[name].generate(ids, **options))


def test_all_budgets_share_one_set_of_weights(family):
    model, budgets, extracted = family
    full = sum(parameter.numel() * parameter.element_size() for parameter in extracted["full"].parameters())
    assert model.num_bytes() == full
    shared = {weight.untyped_storage().data_ptr() for weight in model.weights.values()}
    for name in budgets:
        for parameter_name, parameter in model.at(name).named_parameters():
            if parameter.dim() == 2:  # norms, biases and convolutions may be copies
                assert parameter.untyped_storage().data_ptr() in shared, parameter_name


def test_budgets_in_between_and_unknown_ones(family):
    model, budgets, _ = family
    between = dataclasses.replace(budgets["big"], hidden_size=budgets["small"].hidden_size).resolve(model.config)
    ids = random_ids(model.config, 5, (1, 6))
    assert model.at(between)(ids).logits.shape == (1, 6, model.config.vocab_size)
    assert model.at("full") is model.at(1.0)
    with pytest.raises(ValueError, match="budget: got 'huge'"):
        model.at("huge")
    wide = dataclasses.replace(budgets["small"], hidden_size=model.config.hidden_size)
    with pytest.raises(ValueError, match="is not nested in"):
        model.at(wide)


def test_budgets_take_turns_in_one_conversation(family):
    """Each reads what the others have added, and continues as its extracted model would continue the same text."""
    model, _, extracted = family
    conversation = model.conversation()
    with pytest.raises(ValueError, match="there is no text yet"):
        conversation.generate("full")
    conversation.say(random_ids(model.config, 6, (1, 7)))
    for turn, name in enumerate(["full", "small", "full", "big", "small"]):
        conversation.say(random_ids(model.config, turn, (1, 1 + turn)))
        length = conversation.input_ids.shape[1]
        new = conversation.generate(name, **GREEDY)
        with torch.no_grad():
            logits = extracted[name](conversation.input_ids, use_cache=False).logits[0, length - 1 : -1]
        chosen = logits.gather(1, new.T)[:, 0]  # greedy, but for ties that rounding decides
        assert new.shape == (1, 5) and torch.all(chosen >= logits.max(1).values - 1e-4)


def test_a_cache_is_handed_over_to_the_same_sizes_unchanged(family):
    model, budgets, _ = family
    ids = random_ids(model.config, 8, (2, 9))
    with torch.no_grad():
        first = model.at("big")(ids, use_cache=True)
        copy = part_of_cache(model.config, first.past_key_values, budgets["big"], budgets["big"])
        again = model.at("big")(ids[:, :1], past_key_values=copy, use_cache=True).logits
        assert torch.equal(again, model.at("big")(ids[:, :1], past_key_values=first.past_key_values).logits)


def test_a_smaller_budget_goes_on_from_a_larger_ones_cache(family):
    model, *_ = family
    conversation = model.conversation()
    conversation.say(random_ids(model.config, 8, (1, 9)))
    conversation.generate("full", **GREEDY)
    seen = []
    hook = model.at("small").register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    conversation.generate("small", hand_over=True, **GREEDY)
    hook.remove()
    assert seen == [1] * 5  # the text has been read by the larger one, but for its last token
    assert conversation.input_ids.shape == (1, 19)


def test_budgets_that_are_not_nested_are_refused():
    config = random_config(1)
    wide = Submodel(intermediate_size=3)
    with pytest.raises(ValueError, match="is not nested in"):
        nested_chain(config, [wide.resolve(config), Submodel(hidden_size=5).resolve(config)])


ROWS = (9, 5, 1, 2)  # lengths


def padded(config, side: str) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Rows of ROWS tokens, the same rows padded with token 0, and their mask."""
    rows = [random_ids(config, i, (1, length)).clamp(min=1) for i, length in enumerate(ROWS)]
    ids, mask = torch.zeros(2, len(ROWS), max(ROWS), dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(max(ROWS) - row.shape[1], None) if side == "left" else slice(row.shape[1])
        ids[i, place], mask[i, place] = row[0], 1
    return rows, ids, mask


def test_padded_rows_are_continued_as_each_row_alone_or_refused(family):
    model, *_ = family
    for name in ("full", "small"):
        rows, ids, mask = padded(model.config, "left")
        if not architectures.pads_exactly(model.config):
            with pytest.raises(UserError, match=r"use_bias.*one row at a time"):
                model.generate(ids, name, attention_mask=mask, **GREEDY)
            with torch.no_grad():  # and rightly so: what transformers computes is another text
                wrong, alone = (
                    model.at(name)(ids, attention_mask=mask).logits[1, -5:],
                    model.at(name)(rows[1]).logits[0],
                )
            assert relative_error(wrong, alone) > 5e-5  # rounding is below 1e-6
            continue
        for options in ({"attention_mask": mask}, {"pad_token_id": 0}):  # without a mask, transformers finds token 0
            found = model.generate(ids, name, **options, **GREEDY)
            for row, new in zip(rows, found[:, max(ROWS) :], strict=True):
                assert torch.equal(new, model.generate(row, name, **GREEDY)[0, row.shape[1] :])


def test_other_padding_is_refused(family):
    model, *_ = family
    _, ids, mask = padded(model.config, "right")
    for options in ({"attention_mask": mask}, {"pad_token_id": 0}):
        with pytest.raises(UserError, match=r"rows \[1, 2, 3\] end with padding .*pad on the left"):
            model.generate(ids, "small", **options, **GREEDY)
    mask = torch.ones_like(ids)
    mask[:2, 3], mask[2, :4] = 0, 0
    with pytest.raises(UserError, match=r"rows \[0, 1\] have padding inside the text"):
        model.generate(ids, "small", attention_mask=mask, **GREEDY)
    with pytest.raises(UserError, match=r"attention_mask: got shape \(4, 8\); allowed: \(4, 9\)"):
        model.generate(ids, "small", attention_mask=mask[:, 1:], **GREEDY)
    assert model.generate(ids, "small", attention_mask=torch.ones_like(ids), **GREEDY).shape == (4, 14)
    assert model.generate(
        ids, "small", pad_token_id=0, eos_token_id=[0, 1], do_sample=False, max_new_tokens=1
    ).shape == (4, 10)


def test_rows_with_budgets_of_their_own(family):
    model, budgets, _ = family
    names = ["small", "full", "small", budgets["big"]]
    rows, ids, mask = padded(model.config, "left")
    if not architectures.pads_exactly(model.config):
        rows = [random_ids(model.config, i, (1, 6)).clamp(min=1) for i in range(len(names))]
        ids, mask = torch.cat(rows), torch.ones(len(rows), 6, dtype=torch.int64)
    alone = [model.generate(row, name, **GREEDY)[0, row.shape[1] :] for row, name in zip(rows, names, strict=True)]
    end = alone[0][1].item()  # the first row ends early
    options = GREEDY | {"attention_mask": mask, "eos_token_id": end, "pad_token_id": 0}
    found = model.generate(ids, names, **options)
    for row, tokens in enumerate(alone):
        stop = tokens.tolist().index(end) + 1 if end in tokens else 5
        assert torch.equal(found[row, ids.shape[1] :][:stop], tokens[:stop])
        assert not found[row, ids.shape[1] + stop :].any()
    with pytest.raises(UserError, match="got 3 for 4 rows"):
        model.generate(ids, names[:3], **options)
    with pytest.raises(UserError, match="num_return_sequences: not allowed"):
        model.generate(ids, names, num_return_sequences=2, **options)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bfloat16_and_other_devices(tmp_path, device):
    """The models of budgets are those that are extracted in the same element type."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    budgets = make_family(tmp_path / "elastic", 4)
    model = NestedModel.from_pretrained(tmp_path / "elastic", torch.bfloat16, device)
    ids = random_ids(model.config, 3).to(device)
    for name in budgets:
        extract(tmp_path / "elastic", name, tmp_path / name, dtype=torch.bfloat16)
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto").to(device).eval()
        with torch.no_grad():
            logits, expected = model.at(name)(ids).logits, alone(ids).logits
        assert relative_error(logits.float(), expected.float()) < 2e-2  # sums of bfloat16 numbers in another order
        options = GREEDY | {"attention_mask": torch.ones_like(ids)}
        assert model.generate(ids, name, **options).shape == (len(ids), ids.shape[1] + 5)
        types = [{n: p.dtype for n, p in one.named_parameters()} for one in (model.at(name), alone)]
        assert types[0] == types[1]
