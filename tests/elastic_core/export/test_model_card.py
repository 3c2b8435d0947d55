"""The model card of an export: what it says of the parent, of the sizes, and of where the weights come from."""

import json

import pytest
from huggingface_hub import ModelCard

from elastic_core import ElasticModel, Submodel, extract
from elastic_core.cost.metrics import num_parameters
from elastic_core.errors import UserError
from elastic_core.export import elastic_checkpoint, model_card
from elastic_core.search.selection import Member
from tests.support.models.parents import random_elastic
from tests.support.models.routed_family import CONFIG

NAMED = {"license": "other", "license_name": "open-model", "license_link": "https://x.y/license", "language": ["en"]}
CARD = "license: other\nlicense_name: open-model\nlicense_link: >-\n  https://x.y/license\nlanguage:\n- en\n"
SMALL = Submodel(hidden_size=12, kept_layers=(0, 1, 2, 3), intermediate_size=(8, 6), mamba_num_heads=2)
RECORD = {"stage": "rank", "commit": "0123456789abcdef", "clean": False, "started": "2026-11-30T05:57:18+00:00"}
RECORD |= {"device": "a CPU", "tokens": 1234, "key": "k", "parameters": {}, "libraries": {}, "files": {}}
RECORD |= {"fingerprints": {}, "seconds": 1.0}


@pytest.fixture
def family(tmp_path):
    random_elastic(0, CONFIG).save_pretrained(tmp_path / "family")
    members = {"full": Member(1.0, Submodel()), "small": Member(0.4, SMALL)}
    elastic_checkpoint.write(tmp_path / "family", CONFIG, members, [])
    facts = {"base_model": "nvidia/parent", "license": "other", "license_name": "open-model"}
    model_card.write_parent_facts(tmp_path / "family", facts)
    (tmp_path / "family/provenance.json").write_text(json.dumps({"stages": [RECORD]}))
    return tmp_path / "family"


def test_an_export_has_a_card_that_the_hub_reads(family, tmp_path):
    extract(family, "small", tmp_path / "small")
    card = ModelCard.load(tmp_path / "small/README.md")
    assert card.data.license_name == "open-model" and card.data.base_model == "nvidia/parent"
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    count = num_parameters(CONFIG, SMALL.resolve(CONFIG))
    assert f"# {count:,} parameters, budget small\n" in card.text
    assert f"{count / num_parameters(CONFIG):.1%} of the {num_parameters(CONFIG):,}" in card.text
    assert "trust_remote_code=True" in card.text  # its MLPs differ
    assert "| 1 | - | 1 | MLP 8 |" in card.text and "hidden 12; vocabulary" in card.text
    assert "| rank | 0123456789ab with changes | 2026-11-30 | 1,234 | a CPU |" in card.text
    assert (tmp_path / "small" / "parent_card.json").is_file()
    extract(family, SMALL, tmp_path / "other", name="given", heterogeneous="pad")
    other = ModelCard.load(tmp_path / "other/README.md").text
    assert "parameters, budget given\n" in other and "trust_remote_code" not in other


def test_the_card_of_a_family_lists_its_budgets(family):
    card = ModelCard(model_card.card_of_family(family))
    assert card.data.base_model == "nvidia/parent"
    count, full = num_parameters(CONFIG, SMALL.resolve(CONFIG)), num_parameters(CONFIG)
    assert f"| full | 1 | {full:,} | 100.0% | 5 / 5 |" in card.text
    assert f"| small | 0.4 | {count:,} | {count / full:.1%} | 4 / 5 |" in card.text


@pytest.mark.parametrize(
    "files, facts",
    [
        ({"README.md": f"---\n{CARD}---\n# Parent\n", "LICENSE": "MIT License"}, NAMED),
        ({"LICENSE": "   Apache License\n  Version 2.0, January 2004"}, {"license": "apache-2.0"}),
        ({"README.md": "# no metadata", "LICENSE.txt": "MIT License"}, {"license": "mit"}),
        ({"license.md": "Yours"}, {"license": "other", "license_link": "license.md"}),
        ({"NOTICE": "Copyright"}, {}),
        ({}, {}),
    ],
)
def test_what_is_known_of_a_parent(tmp_path, files, facts):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert model_card.parent_facts(tmp_path, None) == facts
    assert model_card.parent_facts(tmp_path, "me/parent") == {"base_model": "me/parent", **facts}


@pytest.mark.parametrize("text", ["---\na: [\n---\n", "---\n- a\n---\n"])
def test_a_broken_card_of_a_parent_is_named(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(UserError, match=r"README\.md: its metadata cannot be read"):
        model_card.parent_facts(tmp_path, None)


def test_a_section_is_replaced_or_added():
    card = "# A\n\ntext\n\n## One\n\n1\n\n## Two\n\n2\n"
    assert model_card.with_section(card, "One", "new") == "# A\n\ntext\n\n## One\n\nnew\n\n## Two\n\n2\n"
    assert model_card.with_section(card, "Two", "new") == "# A\n\ntext\n\n## One\n\n1\n\n## Two\n\nnew\n"
    assert model_card.with_section(card, "Three", "3") == card + "\n## Three\n\n3\n"


def test_a_parent_of_which_nothing_is_known(tmp_path):
    ElasticModel(CONFIG).save_pretrained(tmp_path / "model")
    extract(tmp_path / "model", Submodel(), tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.license is None and card.data.base_model is None
