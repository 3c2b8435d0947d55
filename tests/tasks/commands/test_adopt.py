"""`elastic adopt`: a nested checkpoint of another program becomes one of ours, in either order of heads."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, NemotronHConfig, PreTrainedTokenizerFast

from elastic_core import ElasticModel, Submodel, extract
from elastic_core.errors import UserError
from elastic_core.export import adoption, elastic_checkpoint
from elastic_core.model.dims import permute
from tasks.commands.adoption.adopt import adopt
from tasks.commands.inspect import inspect_checkpoint
from tests.support.models.parents import random_elastic
from tests.support.pipeline.command_line import call, error_of

WORDS = [f"w{i}" for i in range(24)]
CONFIG = NemotronHConfig(
    vocab_size=len(WORDS),
    hidden_size=32,
    layers_block_type=NemotronHConfig._pattern_to_list("M-*M"),
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=32,
    mamba_num_heads=8,
    mamba_head_dim=8,
    n_groups=2,
    ssm_state_size=8,
    eos_token_id=0,
    bos_token_id=None,
    pad_token_id=None,
)
SIZES = {
    "large": {},
    "small": {"hidden_size": 24, "intermediate_size": 16, "mamba_num_heads": 4, "num_attention_heads": 4},
}
MEMBERS = {name: Submodel(**sizes).resolve(CONFIG) for name, sizes in SIZES.items()}
TEXT = " ".join(WORDS[i * i % 24] for i in range(600))


def save(model, directory):
    model.save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def trained():
    """A model that knows the text as a whole and as its small member."""
    torch.manual_seed(0)
    model = random_elastic(0, CONFIG)
    ids = torch.tensor([[WORDS.index(word) for word in TEXT.split()[:49]]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        for member in MEMBERS.values():
            F.cross_entropy(model(ids[:, :-1], member)[0], ids[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def by_group(trained, tmp_path_factory):
    return save(trained, tmp_path_factory.mktemp("nested") / "by_group")


@pytest.fixture(scope="module")
def by_shard(trained, tmp_path_factory):
    """The same model as a program writes it whose four shards keep the first heads of every shard."""
    inverse = {}
    for key, order in adoption.sorted_orders(CONFIG, MEMBERS, 4).items():
        inverse[key] = order.argsort()
    assert len(inverse) == 3  # two Mamba layers and one of attention
    other = ElasticModel(CONFIG)
    with torch.no_grad():
        for name, dims in other.layout.items():
            other.get_parameter(name).copy_(permute(trained.get_parameter(name), dims, inverse))
    return save(other, tmp_path_factory.mktemp("nested") / "by_shard")


@pytest.fixture
def files(tmp_path):
    (tmp_path / "sizes.json").write_text(json.dumps(SIZES))
    (tmp_path / "text.txt").write_text(TEXT)
    return {"sizes": tmp_path / "sizes.json", "text": tmp_path / "text.txt", "tokens": 48}


def tensors(directory):
    return dict(ElasticModel.from_pretrained(directory).named_parameters())


def test_losses_are_those_of_the_extracted_models(by_group, files, tmp_path):
    done = adopt(by_group, **files, out=tmp_path / "family")
    assert done.head_order == "group" and list(done.members) == ["large", "small"]
    ids = torch.tensor([[WORDS.index(word) for word in TEXT.split()[:48]]])
    for name, loss in done.losses.items():
        extract(tmp_path / "family", name, tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            assert loss == pytest.approx(model(ids, labels=ids).loss.item(), abs=1e-5)
    described = inspect_checkpoint(tmp_path / "family")
    assert described["budgets"]["small"]["widths"]["mamba_num_heads"] == 4 and described["tokenizer"]
    assert not (by_group / elastic_checkpoint.FILE).exists()  # a copy leaves the original as it was


def test_heads_by_shard_are_found_and_sorted(by_group, by_shard, files, tmp_path):
    with pytest.raises(UserError, match=r"shard:4: the heads have to be sorted.*--out"):
        adopt(by_shard, **files)
    done = adopt(by_shard, **files, out=tmp_path / "family")
    assert done.head_order == "shard:4" and done.by_order["shard:4"] < done.by_order["group"] - 0.5
    written, expected = tensors(tmp_path / "family"), tensors(by_group)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())
    with pytest.raises(UserError, match=r"got group, with which .* with shard:4 it is"):
        adopt(by_shard, **files, head_order="group")


def test_nothing_is_replaced_unasked(by_group, files, tmp_path, monkeypatch):
    """Not another model; not what is read, also with `force`. All of it is told before losses are measured."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    (other / "model.safetensors").write_text("weights")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years of work")
    monkeypatch.setattr(adoption, "losses", lambda *_: pytest.fail("losses were measured"))
    with pytest.raises(UserError, match=r"other: exists; name another directory, or replace it with --force"):
        adopt(by_group, **files, out=other)
    with pytest.raises(UserError, match=r"thesis: exists and has no config\.json"):
        adopt(by_group, **files, out=tmp_path / "thesis", force=True)
    with pytest.raises(UserError, match=r"chapter/out; allowed: a directory that can be written"):
        adopt(by_group, **files, out=tmp_path / "thesis" / "chapter" / "out")
    for out in (by_group, by_group / "sub", by_group.parent, tmp_path):  # the last one contains the sizes
        with pytest.raises(UserError, match=r"(or contains it|lies in .*); name another directory"):
            adopt(by_group, **files, out=out, force=True)
    assert (other / "model.safetensors").read_text() == "weights" and (by_group / "model.safetensors").is_file()
    with pytest.raises(UserError, match="contains it"):
        adoption.write_sorted(by_group, by_group / ".." / "by_group", CONFIG, MEMBERS, adoption.BY_GROUP)


def test_another_model_is_replaced_by_force(by_group, files, tmp_path):
    (tmp_path / "family").mkdir()
    (tmp_path / "family" / "config.json").write_text("{}")
    adopt(by_group, **files, out=tmp_path / "family", force=True)
    assert inspect_checkpoint(tmp_path / "family")["budgets"].keys() == {"large", "small"}


def test_shards_with_several_groups_cannot_be_expressed(by_group, files):
    """The first half of the heads of one shard is the whole first group."""
    with pytest.raises(UserError, match=r"which no config\.json can express"):
        adopt(by_group, **files, head_order="shard:1", force=True)
    assert adoption.possible_orders(CONFIG, {"large": MEMBERS["large"]}) == [adoption.BY_GROUP]


def test_wrong_layers_and_sizes_are_told(by_group, files, tmp_path):
    files["sizes"].write_text(json.dumps({"small": SIZES["small"] | {"kept_layers": [1, 2]}}))
    with pytest.raises(UserError, match=r"above that of the whole model.*: small \d"):
        adopt(by_group, **files)
    files["sizes"].write_text(json.dumps({"a": {"hidden_size": 24}, "b": {"intermediate_size": 8}}))
    with pytest.raises(UserError, match=r"sizes\.json: a: .*not nested in b"):
        adopt(by_group, **files)
    files["sizes"].write_text(json.dumps({"a": {}, "b": {}}))
    with pytest.raises(UserError, match="same sizes as a"):
        adopt(by_group, **files)
    for order in ("shards", "shard:0", "shard:3"):
        files["sizes"].write_text(json.dumps(SIZES))
        with pytest.raises(UserError, match="--head-order: got"):
            adopt(by_group, **files, head_order=order)
    assert not (by_group / elastic_checkpoint.FILE).exists()


def test_permutations_make_any_kept_heads_the_first(by_shard):
    """For three nested members of an order: sorted by group, the first heads are the ones that the order keeps."""
    members = {str(k): dataclasses.replace(MEMBERS["large"], mamba_num_heads=k).resolve(CONFIG) for k in (8, 4)}
    for key, order in adoption.sorted_orders(CONFIG, members, 4).items():
        units = adoption.head_units(CONFIG)[key]
        kept = adoption.kept_heads(units, 4, 4)
        assert kept[order[units.prefix(4)]].all() and kept.sum() == 4


def test_the_command_adopts_in_place_and_once(by_group, files):
    options = ("--sizes", files["sizes"], "--text", files["text"], "--tokens", 48)
    text = call("adopt", by_group, *options)
    assert "an elastic checkpoint of 2 members" in text and "head order group" in text
    assert json.loads((by_group / elastic_checkpoint.FILE).read_text())["budgets"]["large"]["target"] == 1.0
    assert "small" in call("inspect", by_group)
    assert "has an elastic.json already" in error_of("adopt", by_group, *options)
    (by_group / elastic_checkpoint.FILE).unlink()
