"""What the stages that train a family check before they take a step, and what they say of the router's candidates."""

import json

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from elastic_core import ElasticModel
from elastic_core.training.candidates import choose_family
from elastic_core.training.distributed.ranks import Ranks
from elastic_core.training.stage import Routing
from tasks.runs.job import Job
from tasks.settings.sections import Compute
from tasks.training import family
from tasks.training.teacher import READ
from tests.support.models.parents import random_elastic
from tests.support.models.routed_family import CONFIG
from tests.support.runs import MEMBERS, make_run, make_stage


def test_sequences_too_short_for_the_data_and_foreign_tokenizers(data, tmp_path, monkeypatch):
    parent = random_elastic(0, CONFIG)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))).save_pretrained(tmp_path / "t")
    parent.save_pretrained(tmp_path / "rank" / "model", tokenizer_from=tmp_path / "t")
    monkeypatch.setattr(family, "DATA", data.directory)
    monkeypatch.setattr(family, "RANK", tmp_path / "rank")
    monkeypatch.setattr(family, "train", lambda run: pytest.fail("a step was taken"))

    class Settings:
        seed = 0
        compute = Compute(storage=str(tmp_path))

    def begin(stage):
        members, job = (
            {"full": MEMBERS["full"]},
            Job("train_short", "key", {"files": dict.fromkeys(READ, "digest"), "libraries": {}}),
        )
        return family.make_run(Settings, job, stage, 2, parent, {"full": 1.0}, Ranks(), members=members)

    with pytest.raises(ValueError, match=r"tokenised with another vocabulary .* than that of the parent"):
        begin(make_stage())
    monkeypatch.setattr(family, "check_tokenizer", lambda *_: None)
    with pytest.raises(ValueError, match=r"no document fits sequence_length 2, the shortest has 5 tokens"):
        begin(make_stage(sequence_length=2, mixture={"short": 1.0}))
    with pytest.raises(ValueError, match=r"mixture: unknown source 'prose'; .* has text, short"):
        begin(make_stage(mixture={"prose": 1.0}))
    assert isinstance(begin(make_stage()).frozen_teacher, ElasticModel)
    run = begin(make_stage(teacher="cached", kept_logits=4))
    assert run.frozen_teacher is None and not run.teacher_cache.missing()
    assert run.teacher_cache.directory.parent == tmp_path and run.cached_logits(0).ids.shape == (2, 16, 4)


def test_candidates_are_written_with_their_sizes_and_said(data, tmp_path, monkeypatch, capsys):
    run, job = make_run(data, make_stage(), routed=True, routing=Routing(candidates=2)), Job("train_short", "key")
    monkeypatch.chdir(tmp_path)
    family.save_comparison(run, job)
    assert json.loads((job.out / "candidates.json").read_text()) is None  # nothing was compared
    (_, medium, _), run.comparison = choose_family(run)
    family.save_comparison(run, job)
    found = json.loads((job.out / "candidates.json").read_text())
    rows = found["candidates"]["medium"]
    assert found["chosen"]["indices"][1] == medium and {row["tokens"] > 0 for row in rows} == {True}
    sizes = {tuple(row["indices"]): row["submodel"] for row in rows}
    assert sizes[tuple(medium)] == json.loads(json.dumps(run.router.space.submodel(medium).to_dict()))
    said = capsys.readouterr().out
    kl = found["chosen"]["kl"]["medium"]
    assert f"train_short: medium: best of {len(rows)} candidates: KL {kl:.4g} (the router's own: " in said
