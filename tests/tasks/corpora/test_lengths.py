"""Histograms of lengths, and what sequences lose of documents."""

import numpy as np
import pytest

from tasks.corpora.lengths import Bucket, fit, histogram

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
