"""Packing and reading: every sequence is what its number says, whoever asks for it."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from elastic_core.data import packing
from elastic_core.data.loader import (
    IGNORED_LABEL,
    PackedSequences,
    TokenData,
    check_tokenizer,
    held_out_batches,
    vocabulary_sha256,
)
from elastic_core.data.token_files import SPLITS, Manifest, Source, SplitWriter

EOS, LENGTH = 0, 16


def write_data(directory, documents, *, vocab_size=60_000, bos=EOS):
    """`documents`: source → (whole_documents, split → lists of token ids without eos)."""
    directory.mkdir(exist_ok=True)
    manifest = Manifest(vocab_size, EOS, bos, "no tokenizer", {})
    for name, (whole, by_split) in documents.items():
        splits = {}
        for split, texts in by_split.items():
            writer = SplitWriter(directory, name, split, manifest.dtype)
            for ids in texts:
                writer.append([[*ids, EOS]], num_bytes=3 * len(ids))
            splits[split] = writer.close()
        manifest.sources[name] = Source(whole, splits)
    manifest.write(directory)
    return TokenData(directory)


def whole_documents(count, longest, rng):
    """Documents no two of which share a token, 2 to `longest` tokens long."""
    lengths = rng.integers(2, longest + 1, size=count)
    starts = 1 + np.concatenate([[0], np.cumsum(lengths)])
    return [list(range(starts[i], starts[i + 1])) for i in range(count)]


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    stream = [list(range(1 + 100 * i, 101 + 100 * i)) for i in range(12)]  # all different, but for eos
    steps = whole_documents(60, 14, rng)
    return write_data(
        tmp_path / "data",
        {
            "prose": (False, {"train": stream, "held_out": stream[:3]}),
            "code": (False, {"train": stream[:5], "held_out": stream[:1]}),
            "chains": (True, {"train": steps, "held_out": steps[:20]}),
        },
    )


def test_a_batch_is_its_samples_one_by_one_in_any_division(data):
    sequences = PackedSequences(data, {"prose": 0.5, "code": 0.2, "chains": 0.3}, LENGTH, seed=3)
    inputs, labels = sequences.batch(7, 300)  # several epochs of each source
    assert inputs.shape == labels.shape == (300, LENGTH)
    assert inputs.dtype == labels.dtype == torch.int64
    fresh = PackedSequences(data, {"prose": 0.5, "code": 0.2, "chains": 0.3}, LENGTH, seed=3)
    for i in reversed(range(300)):
        one_inputs, one_labels = fresh.batch(7 + i, 1)
        assert torch.equal(one_inputs[0], inputs[i]) and torch.equal(one_labels[0], labels[i])


def test_seed_and_epoch_change_the_order_and_nothing_else(data):
    first, second = (PackedSequences(data, {"prose": 1}, LENGTH, seed) for seed in (1, 2))
    rows = first.num_sequences("prose")
    epochs = [first.batch(0, rows)[0], first.batch(rows, rows)[0], second.batch(0, rows)[0]]
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[0], epochs[2])
    as_sets = [{tuple(row) for row in epoch.tolist()} for epoch in epochs]
    assert as_sets[0] == as_sets[1] == as_sets[2] and len(as_sets[0]) == rows


@pytest.mark.parametrize(
    "shares",
    [[1], [0.5, 0.5], [0.4, 0.35, 0.25], [3, 2, 1], [1 / 3, 2 / 3], [0.1, 0.2, 0.3, 0.15, 0.25], [0.123, 7, 1]],
)
def test_shares_hold_after_every_number_of_samples(shares):
    turns = packing.schedule(shares)
    turns = np.concatenate([turns, turns])
    counts = np.cumsum(turns[:, None] == np.arange(len(shares)), axis=0)
    expected = np.arange(1, len(turns) + 1)[:, None] * np.array(shares) / sum(shares)
    assert np.abs(counts - expected).max() < 1
    if len(shares) == 2:  # then even every window is within one
        deviations = np.concatenate([np.zeros((1, 2)), counts - expected])
        assert np.ptp(deviations, axis=0).max() <= 1 + 1e-9


def test_shares_that_are_no_small_ratios_are_rounded_but_never_to_nothing():
    turns = packing.schedule([1e-9, 0.31415926, 0.27182818])
    counts = np.bincount(turns)
    assert counts[0] == 1
    assert counts[1] / counts[2] == pytest.approx(0.31415926 / 0.27182818, rel=1e-4)


def test_batches_take_sources_by_their_shares(data):
    mixture = {"prose": 0.5, "code": 0.0, "chains": 0.25}
    sequences = PackedSequences(data, mixture, LENGTH, seed=0)
    assert sequences.sources == ("prose", "chains")
    for first in range(0, 50, 7):
        prose = int((sequences.source_indices(first, 30) == 0).sum())
        assert prose == 20


def test_an_epoch_of_running_text_predicts_every_token_once(data):
    sequences = PackedSequences(data, {"prose": 1.0}, LENGTH, seed=5)
    stream = np.asarray(data.tokens("prose", "train")).astype(int)
    inputs, labels = sequences.batch(0, sequences.num_sequences("prose"))
    assert torch.equal(inputs[:, 1:], labels[:, :-1])
    predicted = np.bincount(labels.flatten(), minlength=stream.max() + 1)
    used = 1 + sequences.num_sequences("prose") * LENGTH
    assert len(stream) - LENGTH < used <= len(stream)
    np.testing.assert_array_equal(predicted, np.bincount(stream[1:used], minlength=stream.max() + 1))


@pytest.mark.parametrize("bos", [EOS, 59_999, None])
def test_documents_stay_whole_and_come_once(tmp_path, bos):
    documents = whole_documents(400, 20, np.random.default_rng(1))
    data = write_data(tmp_path / "data", {"chains": (True, {"train": documents})}, bos=bos)
    sequences = PackedSequences(data, {"chains": 1}, LENGTH, seed=0)
    inputs, labels = sequences.batch(0, sequences.num_sequences("chains"))
    found = []
    for row, row_labels in zip(inputs.tolist(), labels.tolist(), strict=True):
        padding = row_labels.count(IGNORED_LABEL)
        kept = LENGTH - padding
        assert row_labels[:kept] == row[1 : kept + 1] + row_labels[kept - 1 : kept] * (padding == 0)
        assert row_labels[kept:] == [IGNORED_LABEL] * padding and set(row[kept + 1 :]) <= {EOS}
        tokens = row[:1] + row_labels[:kept]
        assert tokens[-1] == EOS
        if bos == EOS:
            assert tokens.pop(0) == EOS
        found += [part.split() for part in " ".join(map(str, tokens)).split(f" {EOS}")]
    room = LENGTH + 1 - (bos == EOS)
    expected = [[str(i) for i in ids] for ids in documents if len(ids) + 1 <= room]
    assert sorted(part for part in found if part) == sorted(expected)
    assert len(expected) < len(documents)  # some were too long


def test_packing_wastes_little():
    lengths = np.random.default_rng(2).integers(10, 100, size=5000)
    tokens, offsets = np.zeros(lengths.sum(), np.uint16), np.concatenate([[0], np.cumsum(lengths)])
    rows = packing.PackedDocuments(tokens, offsets, row_length=257, lead=None)
    assert len(rows) * 257 < 1.02 * lengths.sum()


@pytest.mark.parametrize("source", ["prose", "chains"])
def test_held_out_sequences_predict_every_token_once_whatever_the_batch(data, source):
    batches = {size: list(held_out_batches(data, source, LENGTH, size)) for size in (1, 4)}
    together = [torch.cat(part) for part in zip(*batches[4], strict=True)]
    assert torch.equal(together[0], torch.cat([inputs for inputs, _ in batches[1]]))
    predicted = together[1][together[1] != IGNORED_LABEL]
    lead = 0 if source == "chains" else 1  # rows of documents start with an eos of their own
    assert sorted(predicted.tolist()) == sorted(np.asarray(data.tokens(source, "held_out"))[lead:].tolist())


def test_held_out_stops_at_max_tokens(data):
    batches = list(held_out_batches(data, "prose", LENGTH, batch_size=2, max_tokens=3 * LENGTH))
    assert [len(inputs) for inputs, _ in batches] == [2, 1]


def test_bytes_per_token_counts_every_token(data):
    assert data.bytes_per_token("prose", "held_out") == 3 * 300 / 303


@pytest.mark.parametrize(
    ("mixture", "length", "message"),
    [
        ({"poems": 1}, LENGTH, "unknown source 'poems'.*prose, code, chains"),
        ({"prose": -0.1, "code": 1}, LENGTH, "mixture.prose: got -0.1"),
        ({"prose": float("nan")}, LENGTH, "mixture.prose"),
        ({"prose": 0, "code": 0}, LENGTH, "positive share"),
        ({}, LENGTH, "positive share"),
        ({"prose": 1}, 5000, "1212 tokens do not fill one sequence of sequence_length 5000"),
        ({"prose": 1}, 0, "sequence_length: got 0"),
        ({"chains": 1}, 2, "no document fits sequence_length 2, the shortest has 3 tokens"),
    ],
)
def test_what_cannot_be_packed_is_named(data, mixture, length, message):
    with pytest.raises(ValueError, match=message):
        PackedSequences(data, mixture, length, seed=0)


@pytest.mark.parametrize("vocab_size", [1 << 16, (1 << 16) + 1])
def test_tokens_take_the_smallest_type_and_stay_themselves(tmp_path, vocab_size):
    ids = [1, 7, vocab_size - 1]
    data = write_data(tmp_path / "data", {"prose": (False, {"train": [ids]})}, vocab_size=vocab_size)
    tokens = data.tokens("prose", "train")
    assert isinstance(tokens, np.memmap) and tokens.tolist() == [*ids, EOS]
    assert tokens.dtype.itemsize == (2 if vocab_size == 1 << 16 else 4)


def test_damaged_directories_are_refused(data):
    tokens = data.directory / "code.train.tokens.npy"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"code\.train\.tokens\.npy: missing, truncated"):
        TokenData(data.directory)
    tokens.write_bytes((data.directory / "prose.train.tokens.npy").read_bytes())
    with pytest.raises(ValueError, match=r"code\.train\.tokens\.npy: holds .*manifest says"):
        TokenData(data.directory)
    tokens.unlink()
    with pytest.raises(ValueError, match=r"code\.train\.tokens\.npy: missing"):
        TokenData(data.directory)
    (data.directory / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is not valid JSON"):
        TokenData(data.directory)
    (data.directory / "manifest.json").unlink()
    with pytest.raises(ValueError, match="not a data directory"):
        TokenData(data.directory)


def test_asking_for_what_is_not_there(data):
    with pytest.raises(ValueError, match=r"no data prose/test.*prose/held_out"):
        data.tokens("prose", "test")
    assert set(data.manifest.sources["prose"].splits) == set(SPLITS)


class Vocabulary(dict):
    """As much of a tokenizer as the check looks at."""

    def get_vocab(self):
        return dict(self)


def test_another_tokenizer_is_noticed(data):
    own, other = Vocabulary(a=0, b=1), Vocabulary(a=1, b=0)
    values = dataclasses.asdict(data.manifest) | {"tokenizer_sha256": vocabulary_sha256(own), "vocab_size": 2}
    (data.directory / "manifest.json").write_text(json.dumps(values), encoding="utf-8")
    data = TokenData(data.directory)
    check_tokenizer(data, Vocabulary(b=1, a=0), vocab_size=8)
    with pytest.raises(ValueError, match=r"another vocabulary .* than that of the teacher"):
        check_tokenizer(data, other, owner="the teacher")
    with pytest.raises(ValueError, match="ids up to 1, but the model has a vocabulary of 1"):
        check_tokenizer(data, None, vocab_size=1)
