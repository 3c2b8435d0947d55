"""What a family that talks exports: plain transformers answers in its chat format and stops at the end of the turn."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastic_core import ElasticModel, extract
from elastic_core.export.nested import NestedModel
from elastic_core.model import hf
from tests.support.models.chat import CHATML, LLAMA3, reciter, write_family

MESSAGES = [{"role": "user", "content": "six times seven?"}]
NAMES = ("bos_token_id", "eos_token_id", "pad_token_id")


@pytest.mark.parametrize("template, end", [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>")])
def test_an_extracted_model_answers_and_stops_in_plain_transformers(tmp_path, template, end):
    """`generate` gets no argument but the prompt. The model would go on with "x" for ever."""
    write_family(tmp_path / "family", f"42{end}", template, eos_token_id=3)
    for budget in ("full", "small"):
        extract(tmp_path / "family", budget, tmp_path / budget)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / budget)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / budget)
        prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt")
        output = model.generate(**prompt)
        assert tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]) == f"42{end}"
        ids = {"bos_token_id": 0, "eos_token_id": [3, 0, tokenizer.convert_tokens_to_ids(end)], "pad_token_id": 1}
        for values in (model.config.to_dict(), model.generation_config.to_dict()):
            assert {name: values[name] for name in NAMES} == ids
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)


def test_all_budgets_in_one_stop_where_the_extracted_models_stop(tmp_path):
    """Other values of generation_config.json count too."""
    write_family(tmp_path / "family", "42<|im_end|>", eos_token_id=3)
    nested = NestedModel.from_pretrained(tmp_path / "family")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "family")
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    for budget in ("full", "small"):
        extract(tmp_path / "family", budget, tmp_path / budget)
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / budget)
        expected = alone.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30)
        assert expected.shape[1] == prompt.shape[1] + 3
        mask = torch.ones_like(prompt)
        assert torch.equal(nested.generate(prompt, budget, attention_mask=mask, max_new_tokens=30), expected)
        assert nested.at(budget).generation_config.to_dict() == alone.generation_config.to_dict()
        talk = nested.conversation()
        talk.say(prompt)
        assert torch.equal(talk.generate(budget, max_new_tokens=30), expected[:, prompt.shape[1] :])
    file = tmp_path / "family/generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_new_tokens": 2}))
    again = NestedModel.from_pretrained(tmp_path / "family")
    assert again.generate(prompt, "small", attention_mask=mask).shape[1] == prompt.shape[1] + 2


def test_a_saved_model_has_the_special_tokens_of_its_tokenizer(tmp_path):
    write_family(tmp_path / "parent", "42<|im_end|>", eos_token_id=3)
    model = ElasticModel.from_pretrained(tmp_path / "parent")
    model.save_pretrained(tmp_path / "family", tokenizer_from=tmp_path / "parent")
    model.save_pretrained(tmp_path / "bare")
    for directory, eos in ((tmp_path / "family", [3, 0, 5]), (tmp_path / "bare", 3)):
        generation = json.loads((directory / "generation_config.json").read_text())
        values = json.loads((directory / "config.json").read_text())
        assert generation["eos_token_id"] == values["eos_token_id"] == hf.read_config(directory).eos_token_id == eos
    assert (tmp_path / "family/chat_template.jinja").read_text() == CHATML


def test_the_model_of_these_tests_goes_on_without_a_stop(tmp_path):
    write_family(tmp_path / "family", "42<|im_end|>")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "family")
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt")
    output = reciter(tokenizer, "42<|im_end|>").generate(**prompt, max_new_tokens=9)
    assert tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]) == "42<|im_end|>xxxxxx"
