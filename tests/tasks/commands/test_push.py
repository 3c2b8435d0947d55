"""`elastic push` and `extract.destination` on the hub: the card with results, and a repository per budget."""

import json
import shutil

import pytest

from elastic_core.config import ConfigError
from elastic_core.export import elastic_checkpoint
from elastic_core.model.submodel import Submodel
from elastic_core.search.selection import Member
from tasks import extract
from tasks.commands.extract import push
from tasks.settings import remote_checks
from tests.support.hub_uploads import headings, uploads
from tests.support.models.parents import random_elastic
from tests.support.models.routed_family import CONFIG
from tests.support.pipeline.command_line import call, error_of

__all__ = ["uploads"]  # a fixture
TASK = {"exact_match": 0.5, "standard_error": 0.05, "chance": 0.1, "items": 100}
SCORES = {"loss": 2.5, "bits_per_byte": 1.25, "kl_to_parent": 0.125, "tasks": {"chains": TASK}}


@pytest.fixture
def run(tmp_path):
    """The artifacts of a run: a family, one model of it, and its scores."""
    family, model = tmp_path / "artifacts/train_extended/model", tmp_path / "artifacts/models/small/extended"
    random_elastic(0, CONFIG).save_pretrained(family)
    small = Submodel(hidden_size=12)
    members = {"full": Member(1.0, Submodel()), "small": Member(0.5, small)}
    elastic_checkpoint.write(family, CONFIG, members, [])
    call("extract", family, model, "--budget", "small")
    (tmp_path / "artifacts/evaluate").mkdir()
    for name in ("parent", "small", "full"):
        scores = {name if name == "parent" else "extended": SCORES}
        (tmp_path / f"artifacts/evaluate/{name}.json").write_text(json.dumps(scores))
    return tmp_path / "artifacts"


def test_a_model_goes_with_its_results_and_its_name(uploads, run):
    said = call("push", run / "models/small/extended", "me/small")
    assert f"{run / 'models/small/extended'}: uploaded to http://127.0.0.1" in said and uploads.private["me/small"]
    card = uploads.files["me/small"]["main"]["README.md"]
    assert headings(card) == ["Use", "Sizes", "Results"] and b'from_pretrained("me/small")' in card
    assert "| chains | 0.500 ± 0.050 (chance 0.100) |" in card.decode()
    assert "| held-out loss (nats per token) | 2.500 |" in card.decode()
    assert b"Results" not in (run / "models/small/extended/README.md").read_bytes()  # the file of the stage stays


def test_a_family_goes_with_a_card_of_all_budgets(uploads, run):
    call("push", run / "train_extended/model", "team/family", "--public", "--revision", "first")
    files = uploads.files["team/family"]["first"]
    assert headings(files["README.md"]) == ["Budgets", "Sizes of the largest", "Results"]
    assert b"|  | full | small |" in files["README.md"] and "elastic.json" in files
    assert uploads.private == {"team/family": False}


def test_a_model_from_elsewhere_goes_as_it_is(uploads, run, tmp_path):
    shutil.copytree(run / "models/small/extended", tmp_path / "model")
    (tmp_path / "model/README.md").unlink()
    push(tmp_path / "model", "me/model")
    assert "README.md" not in uploads.files["me/model"]["main"]
    assert "no config.json in it" in error_of("push", tmp_path / "artifacts", "me/model")
    assert "is no name on the hub" in error_of("push", tmp_path / "model", "model")


def test_stage_extract_copies_every_version_of_a_budget(uploads, run):
    model = run / "models/small/extended"
    assert extract.copy(model, "hf://me/family", "small", "extended").endswith("/me/family-small")
    assert extract.copy(model, "hf://me/family", "small", "short").endswith("/me/family-small/tree/short")
    branches = uploads.files["me/family-small"]
    assert all("model.safetensors" in branches[name] for name in ("main", "short"))
    for name, place in (("main", b'"me/family-small")'), ("short", b'"me/family-small", revision="short")')):
        assert branches[name]["README.md"].count(b"from_pretrained(" + place) == 2  # tokenizer and model


def test_the_destination_is_checked_at_the_start(uploads):
    class settings:
        class extract:
            destination = "hf://other/family"

    with pytest.raises(
        ConfigError, match=r"^params\.yaml: extract\.destination: hf://other/family: the token is of me"
    ):
        remote_checks.check(settings, "extract")
    settings.extract.destination = "hf://me/family"
    remote_checks.check(settings, "extract")
