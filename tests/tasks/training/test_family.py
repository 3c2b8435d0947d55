"""What the stages that train a family check before they load a teacher or take a step."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from elastic_core import ElasticModel
from elastic_core.training.distributed.ranks import Ranks
from tasks.runs.job import Job
from tasks.settings.sections import Compute
from tasks.training import family
from tests.support.models.parents import random_elastic
from tests.support.models.routed_family import CONFIG
from tests.support.runs import MEMBERS, make_stage


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
        members, job = {"full": MEMBERS["full"]}, Job("train_short", "key")
        return family.make_run(Settings, job, stage, 2, parent, {"full": 1.0}, Ranks(), members=members)

    with pytest.raises(ValueError, match=r"tokenised with another vocabulary .* than that of the parent"):
        begin(make_stage())
    monkeypatch.setattr(family, "check_tokenizer", lambda *_: None)
    with pytest.raises(ValueError, match=r"no document fits sequence_length 2, the shortest has 5 tokens"):
        begin(make_stage(sequence_length=2, mixture={"short": 1.0}))
    with pytest.raises(ValueError, match=r"mixture: unknown source 'prose'; .* has text, short"):
        begin(make_stage(mixture={"prose": 1.0}))
    assert isinstance(begin(make_stage()).frozen_teacher, ElasticModel)
