"""A text that budgets continue in turn: after a failed turn, with several rows, and with options that are refused."""

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria

from elastic_core import Submodel
from elastic_core.errors import UserError
from elastic_core.export import elastic_checkpoint
from elastic_core.export.nested import NestedModel
from elastic_core.search.selection import Member
from tests.support.models.parents import CONFIGS, random_ids, save_random_parent

GREEDY = {"do_sample": False, "max_new_tokens": 5}
PAD = 0


@pytest.fixture(scope="module", params=CONFIGS)
def model(request, tmp_path_factory):
    """A family whose configuration names a pad token, and an end that no text here reaches."""
    config = CONFIGS[request.param](1)
    config.pad_token_id, config.eos_token_id = PAD, config.vocab_size - 1
    directory = tmp_path_factory.mktemp(request.param)
    parent = save_random_parent(directory, 1, config)
    with torch.no_grad():
        parent.lm_head.weight[[PAD, -1]] = parent.lm_head.weight.mean(0)
    parent.save_pretrained(directory)
    budgets = {"full": Submodel(), "small": Submodel(intermediate_size=3)}
    members = {name: Member(1.0, submodel) for name, submodel in budgets.items()}
    elastic_checkpoint.write(directory, config, members, [])
    return NestedModel.from_pretrained(directory)


def conversation(model, ids):
    talk = model.conversation()
    talk.say(ids)
    return talk


class Failing:
    """A streamer that fails when it gets the second new token."""

    def __init__(self, error):
        self.error, self.calls = error, 0

    def put(self, value):
        self.calls += 1
        if self.calls == 3:  # the first value is the prompt
            raise self.error("stop")

    def end(self):
        pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_after_a_failed_turn_the_next_one_reads_the_whole_text(model, error):
    talk = conversation(model, random_ids(model.config, 1, (1, 7)))
    talk.generate("full", **GREEDY)
    talk.generate("small", **GREEDY)
    before = talk.input_ids.clone()
    with pytest.raises(error):
        talk.generate("small", streamer=Failing(error), **GREEDY)
    assert torch.equal(talk.input_ids, before)
    talk.say(random_ids(model.config, 2, (1, 6)))
    found = []
    hook = model.at("small").register_forward_hook(lambda module, given, output: found.append(output.logits[:, -1]))
    conversation(model, talk.input_ids).generate("small", **GREEDY)
    expected, found[:] = torch.stack(found), []
    talk.generate("small", **GREEDY)
    hook.remove()
    assert torch.equal(torch.stack(found), expected)


class FirstRowEnds(StoppingCriteria):
    def __call__(self, input_ids, scores, **_):
        return torch.arange(len(input_ids)) == 0


def test_no_turn_reads_the_padding_of_a_row_that_has_ended(model):
    ids = random_ids(model.config, 3, (2, 7))
    first, second = conversation(model, ids).generate("small", **GREEDY).tolist()
    end = next(token for token in first[:4] if token not in second)
    for options in ({"eos_token_id": end}, {"stopping_criteria": [FirstRowEnds()]}):
        talk = conversation(model, ids)
        new = talk.generate("small", **options, **GREEDY)
        assert new[0, -1] == PAD and new[1].tolist() == second
        for turn in (lambda talk=talk: talk.say(ids), lambda talk=talk: talk.generate("full", **GREEDY)):
            with pytest.raises(UserError, match=r"rows \[0\] ended before the others.*one conversation per row"):
                turn()
        assert talk.input_ids.shape == (2, 12)


def test_rows_that_end_together_and_a_single_row_go_on(model):
    ids = random_ids(model.config, 3, (2, 7))
    first, second = conversation(model, ids).generate("small", **GREEDY).tolist()
    talk = conversation(model, ids)
    last = max(i for i in range(5) if not {first[i], second[i]} & {*first[:i], *second[:i]})
    ends = [first[last], second[last]]
    assert talk.generate("small", eos_token_id=ends, **GREEDY).shape == (2, 1 + last)
    assert talk.generate("small", **GREEDY).shape == (2, 5)
    talk = conversation(model, ids[:1])
    assert talk.generate("small", eos_token_id=first[last], **GREEDY).shape == (1, 1 + last)
    assert talk.generate("small", stopping_criteria=[FirstRowEnds()], **GREEDY).shape == (1, 1)
    assert talk.generate("small", **GREEDY).shape == (1, 5)


@pytest.mark.parametrize(
    "name, value", [("num_beams", 2), ("num_return_sequences", 2), ("return_dict_in_generate", True)]
)
def test_options_that_change_the_rows_are_refused(model, name, value):
    ids = random_ids(model.config, 3, (2, 7))
    talk = conversation(model, ids)
    for options in ({name: value}, {"generation_config": GenerationConfig(do_sample=True, **{name: value})}):
        with pytest.raises(UserError, match=rf"^{name}: not allowed in a conversation; allowed: num_beams=1"):
            talk.generate("small", **options, **GREEDY)
        if name != "num_beams":
            with pytest.raises(UserError, match=rf"^{name}: not allowed where rows have budgets of their own"):
                model.generate(ids, ["small", "full"], **options, **GREEDY)
    assert torch.equal(talk.input_ids, ids) and not talk.caches
    allowed = {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False}
    assert talk.generate("small", **allowed, **GREEDY).shape == (2, 5)
    with pytest.raises(UserError, match=r"^past_key_values, attention_mask: not allowed in a conversation"):
        talk.generate("small", past_key_values=talk.caches, attention_mask=torch.ones_like(ids), **GREEDY)


def test_a_given_configuration_leaves_the_pad_token_to_the_models(model):
    """`generate` takes what the given one does not name from the model's, so padding is found by it too."""
    ids = random_ids(model.config, 3, (2, 7)).clamp(min=1)
    options = {"generation_config": GenerationConfig(**GREEDY)}
    first, second = (model.generate(ids[i : i + 1], "small", **options)[0, 7:].tolist() for i in (0, 1))
    end = next(i for i, token in enumerate(first[:4]) if token not in second)
    ends = GenerationConfig(eos_token_id=first[end], **GREEDY)
    found = model.generate(ids, ["small", "small"], generation_config=ends)
    assert found[0, 8 + end :].tolist() == [PAD] * (4 - end)
    ids[0, -2:] = PAD
    with pytest.raises(UserError, match=r"rows \[0\] end with padding"):
        model.generate(ids, "small", **options)
