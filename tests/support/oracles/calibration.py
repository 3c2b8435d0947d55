"""Calibration batches, and importance aggregated by hand."""

from tests.support.models.parents import random_ids

AGGREGATE = {  # over samples (B·L, units)
    "l1": lambda a: a.abs().sum(0),
    "l2": lambda a: a.square().sum(0).sqrt(),
    "mean": lambda a: a.mean(0).abs(),
}


def batches_of(config, seed, count=3, length=11):
    return [random_ids(config, seed + i, (2, length)) for i in range(count)]
