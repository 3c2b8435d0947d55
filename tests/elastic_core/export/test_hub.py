"""Uploads to the Hugging Face hub: one commit that holds the model and nothing of an earlier one."""

import pytest

from elastic_core.errors import UserError
from elastic_core.export import hub
from elastic_core.io.storage import StorageUnavailable
from tests.support.hub_uploads import TOKEN, uploads

__all__ = ["uploads"]  # a fixture
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "norm_gains/budgets.safetensors": b"g",
    "README.md": b"#",
}
OF_A_MODEL = (
    *("model-00001-of-00002.safetensors", "model.safetensors.index.json", "modeling_x.py", "configuration_x.py"),
    *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json", "chat_template.jinja"),
    *("special_tokens_map.json", "added_tokens.json", "additional_chat_templates/tool_use.jinja"),
    *("generation_config.json", "elastic.json", "provenance.json", "parent_card.json", "norm_gains/ratios.safetensors"),
)
OF_THE_OWNER = (
    *("figure.png", "notes.md", "results.json", "demo.py", "prompt.jinja", "my_parser.py", "LICENSE", "arena.model"),
    *("eval/results.json", "eval/config.json", "scripts/demo.py", "scripts/modeling_x.py", "lora/adapter.safetensors"),
    *("templates/chat_template.jinja", "old/norm_gains/ratios.safetensors", "gguf/tokenizer.model"),
)


@pytest.fixture
def model(tmp_path):
    for name, data in FILES.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_bytes(data)
    return tmp_path / "model"


def test_a_model_is_one_commit_in_a_private_repository(uploads, model):
    (model / ".git").mkdir()
    for name in (".env", ".git/config"):  # may hold secrets
        (model / name).write_text("x")
    url = hub.push(model, "me/small", message="first", replaced={"README.md": b"# card"})
    assert url.startswith("http://127.0.0.1") and url.endswith("/me/small")
    assert uploads.private == {"me/small": True} and uploads.commits == [("me/small", "main", "first")]
    assert uploads.files["me/small"]["main"] == {**FILES, "README.md": b"# card", ".gitattributes": b"lfs"}


def test_the_next_model_leaves_nothing_of_the_first(uploads, model):
    hub.push(model, "team/small", private=False)
    there = uploads.files["team/small"]["main"]
    there |= dict.fromkeys(OF_A_MODEL, b"old") | dict.fromkeys(OF_THE_OWNER, b"mine")
    (model / "norm_gains/budgets.safetensors").unlink()
    hub.push(model, "team/small", private=False)
    assert there.keys() == {"config.json", "model.safetensors", "README.md", ".gitattributes", *OF_THE_OWNER}
    assert all(there[name] == b"mine" for name in OF_THE_OWNER)
    assert uploads.private == {"team/small": False} and len(uploads.commits) == 2


def test_a_card_that_the_hub_does_not_accept_is_named(uploads, model):
    with pytest.raises(
        UserError, match=r"me/small: the hub does not accept the upload; check the metadata at the top of"
    ):
        hub.push(model, "me/small", replaced={"README.md": b"---\nlicense: wrong\n---\n"})
    assert uploads.commits == []


def test_a_version_is_a_branch(uploads, model):
    assert hub.push(model, "me/small", revision="short").endswith("/me/small/tree/short")
    hub.push(model, "me/small", revision="short")
    assert {branch: "config.json" in files for branch, files in uploads.files["me/small"].items()} == {
        "main": False,
        "short": True,
    }


def test_what_was_private_by_default_is_not_published(uploads, model):
    hub.push(model, "me/small", private=False)
    with pytest.raises(UserError, match=r"me/small: is public; name another repository, or allow it with --public"):
        hub.push(model, "me/small")
    assert len(uploads.commits) == 1


def test_mistakes_are_named_before_anything_is_created(uploads, model, tmp_path):
    with pytest.raises(UserError, match=r"no config\.json, so it is no model; nothing was uploaded"):
        hub.push(tmp_path, "me/small")
    for name in ("small", "me/a/b", "me/", "me/a b", "https://x/me/a"):
        with pytest.raises(UserError, match=r"is no name on the hub; allowed: OWNER/NAME"):
            hub.push(model, name)
    assert hub.repository_of("hf://me/family", "small") == "me/family-small"
    with pytest.raises(UserError, match=r"'me' is no name on the hub"):
        hub.repository_of("hf://me", "small")
    assert uploads.files == {}


def test_access_is_checked_without_an_upload(uploads):
    hub.check_access("hf://me/family")
    hub.check_access("hf://team/family")
    with pytest.raises(UserError, match=r"hf://other/family: the token is of me; allowed owners: me, team"):
        hub.check_access("hf://other/family")
    assert uploads.files == {}


@pytest.mark.parametrize(
    "status, kind, text",
    [
        (401, UserError, "refuses the token .status 401.; set HF_TOKEN"),
        (403, UserError, "refuses the token .status 403."),
        (404, UserError, "refuses the request .status 404.; check the name"),
        (507, StorageUnavailable, "does not answer .status 507.; try again later"),
    ],
)
def test_answers_of_the_hub_are_told_without_their_text(uploads, model, status, kind, text):
    uploads.status = status
    for ask in (lambda: hub.push(model, "me/small"), lambda: hub.check_access("hf://me/small")):
        with pytest.raises(kind, match=text) as error:
            ask()
        assert "secret" not in str(error.value) and TOKEN not in str(error.value)


def test_without_a_token_or_a_network(uploads, model, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    for ask in (lambda: hub.push(model, "me/small"), lambda: hub.check_access("hf://me/small")):
        with pytest.raises(UserError, match=r"token.*set HF_TOKEN to a token that may write, or run `hf auth login`"):
            ask()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"may not be asked, because HF_HUB_OFFLINE is set"):
        hub.push(model, "me/small")
