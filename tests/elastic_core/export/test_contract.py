"""What config.json and the other small files of a model directory hold, so that all readers take the same model of it.

No weights are needed: the files of every architecture are written and read in milliseconds.
"""

import json
import logging

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, NemotronHConfig, Qwen2Config, Qwen3Config

from elastic_core import ElasticModel, Submodel, extract
from elastic_core.data.special_tokens import generation_values, token_ids, write_text_files
from elastic_core.errors import UserError
from elastic_core.export.extract import config_changes
from elastic_core.io.tensor_files import read_header
from elastic_core.io.tokenizer_files import is_companion, left_out, readable
from elastic_core.model import architectures, hf
from elastic_core.model.files.parent_dtype import parent_dtype, with_parent_dtype
from tests.support.models.chat import CHATML, LLAMA3, chat_tokenizer
from tests.support.models.parents import random_elastic, random_reference, relative_error, save_random_parent

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "head_dim": 8}
SIZES |= {"num_key_value_heads": 2, "tie_word_embeddings": False}
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 6, "n_groups": 2, "ssm_state_size": 8}
EXPERTS = {"n_routed_experts": 4, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 24}
SCALED = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 16}
PLAIN = {"rope_type": "default", "rope_theta": 1e5}
KEYS_OF_EXPERTS = ("expert", "moe", "topk_group", "n_group", "routed", "norm_topk", "router")


def nemotron_h(pattern: str, **values) -> NemotronHConfig:
    return NemotronHConfig(
        **SIZES, **MAMBA, **EXPERTS, layers_block_type=NemotronHConfig._pattern_to_list(pattern), **values
    )


def llama_type(kind, rope, **values):
    return kind(**SIZES, num_hidden_layers=3, max_position_embeddings=64, rope_parameters=rope, **values)


CONFIGS = {
    "hybrid": lambda: nemotron_h("M-*M-"),
    "experts": lambda: nemotron_h("ME*E"),
    "llama": lambda: llama_type(LlamaConfig, PLAIN),
    "llama, scaled": lambda: llama_type(LlamaConfig, SCALED),
    "qwen2": lambda: llama_type(Qwen2Config, PLAIN),
    "qwen3": lambda: llama_type(Qwen3Config, SCALED),
}
SUBMODELS = {"whole": Submodel(), "small": Submodel(hidden_size=32, kept_layers=(0, 2), intermediate_size=20)}


def written(directory, config, submodel: Submodel) -> dict:
    """config.json of a submodel, as JSON without extensions: no Infinity, no NaN."""
    directory.mkdir(exist_ok=True)
    hf.write_config(directory, config, **config_changes(config, submodel.resolve(config)))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((directory / "config.json").read_text(), parse_constant=refuse)


@pytest.mark.parametrize("submodel", SUBMODELS)
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_the_same_configuration_without_a_warning(tmp_path, caplog, monkeypatch, name, submodel):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # to caplog
    config = CONFIGS[name]()
    values = written(tmp_path, config, SUBMODELS[submodel])
    found = AutoConfig.from_pretrained(tmp_path)
    assert not caplog.records
    assert values["head_dim"] == 8 and found.head_dim == 8
    assert (
        values["num_hidden_layers"] == found.num_hidden_layers == len(SUBMODELS[submodel].resolve(config).kept_layers)
    )
    if config.model_type == "nemotron_h":
        assert values["hybrid_override_pattern"] == found.hybrid_override_pattern
    else:
        assert found.rope_parameters == config.rope_parameters
    with torch.device("meta"):  # the sizes of the weights, too
        shapes = {name: tuple(p.shape) for name, p in architectures.model_class(config)(found).named_parameters()}
    reread = architectures.shapes(hf.read_config(tmp_path))
    assert shapes.keys() <= reread.keys() or "experts" in name
    assert all(reread[name] == shape for name, shape in shapes.items() if name in reread)


@pytest.mark.parametrize("name", ["llama", "llama, scaled", "qwen2", "qwen3"])
def test_older_readers_find_the_rotary_positions(tmp_path, name):
    """They know rope_theta and rope_scaling, and nothing of rope_parameters."""
    config = CONFIGS[name]()
    values = written(tmp_path, config, Submodel())
    assert values["rope_theta"] == config.rope_parameters["rope_theta"]
    scaling = {key: value for key, value in config.rope_parameters.items() if key != "rope_theta"}
    assert values["rope_scaling"] == (None if scaling["rope_type"] == "default" else scaling)
    del values["rope_parameters"]  # as such a reader sees it
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


def test_layers_are_written_in_the_spelling_of_all_versions(tmp_path):
    values = written(tmp_path, nemotron_h("M-*M-"), Submodel(kept_layers=(0, 2, 4)))
    assert values["hybrid_override_pattern"] == "M*-" and values["num_hidden_layers"] == 3
    assert not [key for key in values if "block_type" in key or "nextn" in key or "mtp" in key]
    assert "time_step_limit" not in values


@pytest.mark.parametrize(
    "pattern, kept, has_experts", [("M-*M-", None, False), ("ME*E", (0, 2), False), ("ME*E", (1, 2), True)]
)
def test_keys_of_experts_are_only_where_experts_are(tmp_path, pattern, kept, has_experts):
    values = written(tmp_path, nemotron_h(pattern), Submodel(kept_layers=kept))
    found = {key for key in values if any(part in key for part in KEYS_OF_EXPERTS) and key != "n_groups"}
    assert values["n_groups"] == 2 and bool(found) == has_experts
    assert not has_experts or {"n_routed_experts", "num_experts_per_tok", "n_group", "moe_intermediate_size"} <= found


def test_qwen2_has_heads_of_the_size_that_all_readers_take(tmp_path):
    config = CONFIGS["qwen2"]()
    for submodel in (Submodel(hidden_size=24), Submodel(num_attention_heads=2)):
        with pytest.raises(UserError, match=r"hidden_size: got .* times the size of a head \(8\), because only transf"):
            config_changes(config, submodel.resolve(config))
    assert config_changes(config, Submodel(hidden_size=16, num_attention_heads=2).resolve(config))["head_dim"] == 8


def test_a_model_without_attention_asks_for_no_cache(tmp_path):
    """transformers fails when it decodes such a model with a cache."""
    save_random_parent(tmp_path / "parent", 0, nemotron_h("M-*M", eos_token_id=None))
    for kept, says in (((0, 2), True), ((0, 1), False)):
        extract(tmp_path / "parent", Submodel(kept_layers=kept), tmp_path / "out")
        assert json.loads((tmp_path / "out/config.json").read_text())["use_cache"] is says
        generation = json.loads((tmp_path / "out/generation_config.json").read_text())
        assert generation.get("use_cache", True) is says
    model = architectures.model_class(nemotron_h("M")).from_pretrained(tmp_path / "out")
    assert model.generate(torch.arange(5)[None], max_new_tokens=4, do_sample=False).shape == (1, 9)
    ElasticModel(nemotron_h("M-")).save_pretrained(tmp_path / "whole")
    assert json.loads((tmp_path / "whole/generation_config.json").read_text())["use_cache"] is False


@pytest.mark.parametrize("clamped", [False, True])
def test_transformers_computes_with_the_same_time_steps(tmp_path, clamped):
    """In reading; and without a limit in decoding with a cache too, where transformers has none."""
    config = nemotron_h("M*M", time_step_min=0.05, eos_token_id=None)
    config = architectures.with_clamped_time_step(config) if clamped else config
    ours = random_elastic(0, config)
    ours.save_pretrained(tmp_path / "whole")
    values = json.loads((tmp_path / "whole/config.json").read_text())
    assert values.get("time_step_limit") == ([0.05, 1e30] if clamped else None)
    assert values["time_step_min"] == (0.05 if clamped else 1e-30)
    again, ids = hf.read_config(tmp_path / "whole"), torch.arange(40)[None]
    extract(tmp_path / "whole", Submodel(hidden_size=24), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["time_step_min"] == values["time_step_min"]
    model = architectures.model_class(config).from_pretrained(tmp_path / "whole")
    with torch.no_grad():
        assert torch.equal(ElasticModel.from_pretrained(tmp_path / "whole", config=again)(ids), ours(ids))
        assert relative_error(model(ids, use_cache=False).logits, ours(ids)) < 1e-5
    if not clamped:
        cached, plain = (model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False))
        assert torch.equal(cached, plain)


@pytest.mark.parametrize("limit", [[0.1], [0.2, 0.1], [-1.0, 1.0], [0.0, float("nan")], None])
def test_impossible_limits_of_the_time_step_are_named(tmp_path, limit):
    with pytest.raises(UserError, match=r"time_step_limit"):
        written(tmp_path, nemotron_h("M*M"), Submodel())
        values = json.loads((tmp_path / "config.json").read_text()) | {"time_step_limit": limit}
        (tmp_path / "config.json").write_text(json.dumps(values))
        hf.read_config(tmp_path)


# Tokenizer and generation


@pytest.mark.parametrize("template", [CHATML, {"default": CHATML, "tools": LLAMA3}])
@pytest.mark.parametrize("model_type", ["nemotron_h", "llama", "qwen3"])
def test_the_tokenizer_is_written_for_older_readers_too(tmp_path, template, model_type):
    (tmp_path / "out").mkdir()
    tokenizer = chat_tokenizer(template)
    tokenizer.save_pretrained(tmp_path / "parent")
    (tmp_path / "parent/tokenizer.model").write_bytes(b"sentencepiece")
    config = {"nemotron_h": "hybrid"}.get(model_type, model_type)
    generation = generation_values(CONFIGS[config](), tmp_path / "parent")
    hf.write_config(tmp_path / "out", CONFIGS[config](), **token_ids(generation))
    write_text_files(tmp_path / "out", tmp_path / "parent", generation)
    values = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert values["tokenizer_class"] == "PreTrainedTokenizerFast" and "backend" not in values
    assert not isinstance(values.get("extra_special_tokens"), list)
    assert (tmp_path / "out/tokenizer.model").read_bytes() == b"sentencepiece"
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "six times seven?<|im_end|>\n"
    assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert found.all_special_tokens == tokenizer.all_special_tokens and found.chat_template == tokenizer.chat_template
    written = json.loads((tmp_path / "out/config.json").read_text())
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert written[name] == json.loads((tmp_path / "out/generation_config.json").read_text())[name]


def test_a_tokenizer_with_a_class_of_its_own_keeps_it():
    values = {"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": {"image_token": "<i>"}, "bos_token": None}
    assert readable(values) == values
    assert readable({"backend": "sentencepiece"}) == {"backend": "sentencepiece"}


def test_licence_and_parsers_come_along_and_the_rest_is_listed(tmp_path):
    companions = ("LICENSE", "NOTICE.txt", "license_agreement.md", "nano_v3_reasoning_parser.py")
    assert all(map(is_companion, companions)) and not is_companion("modeling_x.py") and not is_companion("README.md")
    names = [*companions, "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    names += ["tokenizer.json", "additional_chat_templates/tools.jinja", "modeling_nemotron_h.py", "README.md"]
    assert left_out([*names, "figures/loss.png", "hf_quant_config.json"]) == [
        "figures/loss.png",
        "hf_quant_config.json",
    ]
    save_random_parent(tmp_path / "parent", 0, CONFIGS["llama"]())
    for name in companions:
        (tmp_path / "parent" / name).write_text(name)
    extract(tmp_path / "parent", Submodel(), tmp_path / "out")
    assert all((tmp_path / "out" / name).read_text() == name for name in companions)


# Weights


@pytest.mark.parametrize("name", ["hybrid", "experts", "llama"])
def test_a_family_of_a_bfloat16_parent_is_exported_in_bfloat16(tmp_path, name):
    """By default. What has to be precise stays in float32."""
    config = with_parent_dtype(CONFIGS[name](), torch.bfloat16)
    ElasticModel(config).save_pretrained(tmp_path / "family")
    assert parent_dtype(hf.read_config(tmp_path / "family"), "") == torch.bfloat16
    extract(tmp_path / "family", Submodel(), tmp_path / "default")
    extract(tmp_path / "family", Submodel(), tmp_path / "given", dtype=torch.float32)
    for out, dtype in (("default", torch.bfloat16), ("given", torch.float32)):
        values = json.loads((tmp_path / out / "config.json").read_text())
        assert values["dtype"] == str(dtype).removeprefix("torch.") and "parent_dtype" not in values
        for tensor, stored in read_header(tmp_path / out / "model.safetensors").items():
            wide = tensor.endswith((".A_log", ".D", ".dt_bias", ".e_score_correction_bias"))
            assert stored.entry.dtype == (torch.float32 if wide else dtype), tensor
    assert with_parent_dtype(config, torch.float32).to_dict().get("parent_dtype") is None
    config.parent_dtype = ["x"]
    with pytest.raises(UserError, match=r"here/config\.json: parent_dtype is \['x'\]; allowed: bfloat16, float16"):
        parent_dtype(config, "here")


def test_files_are_as_large_as_the_parents(tmp_path):
    reference = random_reference(0, CONFIGS["llama"]())
    reference.save_pretrained(tmp_path / "parent", max_shard_size="20KB")
    extract(tmp_path / "parent", Submodel(), tmp_path / "out")
    ElasticModel.from_pretrained(tmp_path / "parent").save_pretrained(tmp_path / "again", tmp_path / "parent")
    sizes = [
        sorted(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors"))
        for name in ("parent", "out", "again")
    ]
    assert all(abs(len(found) - len(sizes[0])) <= 1 and found[-1] <= 1.1 * sizes[0][-1] for found in sizes[1:])
    assert len(sizes[0]) > 2
