"""Small text files, and the configuration that reads them."""

import json

import numpy as np

from elastic_core import config
from tasks.prepare_data import PrepareData

NO_TASKS = {"chains": [], "chains_direct": [], "recall": [], "items": 1}


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")


def texts(count, length=200, seed=0):
    words = ["the", "of", "and", "to", "in", "you", "that", "it", "he", "was", "for", "on", "with", "his", "they"]
    rng = np.random.default_rng(seed)
    return [f"{i}: " + " ".join(rng.choice(words, length // 4)) for i in range(count)]


def configure(sources, **values):
    values = {"vocab_size": 300, "evaluation": NO_TASKS} | values
    return config.load(PrepareData, values | {"sources": sources}, "params.yaml: prepare_data")
