"""Histograms of lengths, and what sequences lose of documents."""

from types import SimpleNamespace

import numpy as np
import pytest

from tasks.corpora.lengths import Bucket, contexts, fit, histogram, split_of

LENGTHS = [2, 3, 4, 5, 8, 100, 1]
OFFSETS = np.concatenate([[0], np.cumsum(LENGTHS)])


def test_a_histogram_has_every_document_and_token_once():
    found = histogram(OFFSETS)
    assert found[:4] == [Bucket(1, 1, 1), Bucket(2, 2, 5), Bucket(4, 2, 9), Bucket(8, 1, 8)]
    assert found[4] == Bucket(16, 0, 0) and found[-1] == Bucket(64, 1, 100)
    assert sum(bucket.num_tokens for bucket in found) == sum(LENGTHS)
    assert histogram(np.array([0])) == []


@pytest.mark.parametrize(("too_long", "lost"), [("drop", 7 + 99), ("truncate", 3 + 95), ("split", 0)])
def test_what_is_lost(too_long, lost):
    found = fit(OFFSETS, 4, too_long)
    positions = sum(LENGTHS) - len(LENGTHS)
    assert found.num_too_long == 2 and found.lost_share == pytest.approx(lost / positions)


def test_evaluation_reads_the_held_out_documents_of_its_sources():
    stage = SimpleNamespace(mixture={"a": 1.0}, sequence_length=8)
    settings = SimpleNamespace(parent=SimpleNamespace(path="mine"), rank=stage, train_short=stage, train_extended=stage)
    settings.evaluate = SimpleNamespace(held_out=("a", "b"), sequence_length=4)
    assert contexts(settings, "a") == dict.fromkeys(("rank", "train_short", "train_extended"), 8) | {"evaluate": 4}
    assert contexts(settings, "b") == {"evaluate": 4} and contexts(settings, "c") == {}
    assert [split_of(stage) for stage in contexts(settings, "a")] == ["train"] * 3 + ["held_out"]
