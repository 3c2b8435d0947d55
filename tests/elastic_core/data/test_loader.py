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
    mean_document_length,
    vocabulary_sha256,
)
from elastic_core.data.token_files import SPLITS, TOO_LONG, Manifest, Source, SplitWriter

EOS, LENGTH = 0, 16


def write_data(directory, documents, *, vocab_size=60_000):
    """`documents`: source → (too_long, split → lists of token ids without eos). Source "masked" trains odd ids only."""
    directory.mkdir(exist_ok=True)
    manifest = Manifest(vocab_size, EOS, None, "no tokenizer", {})
    for name, (too_long, by_split) in documents.items():
        splits = {}
        for split, texts in by_split.items():
            writer = SplitWriter(directory, name, split, manifest.dtype, masked=name == "masked")
            for ids in texts:
                masks = [[token % 2 == 1 for token in [*ids, EOS]]] if name == "masked" else None
                writer.append([[*ids, EOS]], num_bytes=3 * len(ids), trained=masks)
            splits[split] = writer.close()
        manifest.sources[name] = Source(too_long, splits)
    manifest.write(directory)
    return TokenData(directory)


def distinct_documents(count, longest, rng):
    """Documents no two of which share a token, 2 to `longest` tokens long."""
    lengths = rng.integers(2, longest + 1, size=count)
    starts = 1 + np.concatenate([[0], np.cumsum(lengths)])
    return [list(range(starts[i], starts[i + 1])) for i in range(count)]


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    stream = [list(range(1 + 100 * i, 101 + 100 * i)) for i in range(12)]  # all different, but for eos
    steps = distinct_documents(60, 14, rng)
    return write_data(
        tmp_path / "data",
        {
            "prose": ("split", {"train": stream, "held_out": stream[:3]}),
            "code": ("split", {"train": stream[:5], "held_out": stream[:1]}),
            "chains": ("drop", {"train": steps, "held_out": steps[:20]}),
        },
    )


def documents_of(batch):
    """The documents, or parts of documents, of a batch: each as (tokens, labels), in the order of the rows."""
    found = []
    for ids, labels, numbers in zip(*(part.tolist() for part in batch), strict=True):
        assert numbers == sorted(numbers) and numbers[0] == 0
        for number in sorted(set(numbers)):
            places = [i for i, one in enumerate(numbers) if one == number]
            found.append(([ids[i] for i in places], [labels[i] for i in places]))
    return [(ids, labels) for ids, labels in found if set(labels) != {IGNORED_LABEL}]  # the others are padding


def test_a_batch_is_its_samples_one_by_one_in_any_division(data):
    sequences = PackedSequences(data, {"prose": 0.5, "code": 0.2, "chains": 0.3}, LENGTH, seed=3)
    batch = sequences.batch(7, 300)  # several epochs of each source
    assert {part.shape for part in batch} == {(300, LENGTH)} and {part.dtype for part in batch} == {torch.int64}
    fresh = PackedSequences(data, {"prose": 0.5, "code": 0.2, "chains": 0.3}, LENGTH, seed=3)
    for i in reversed(range(300)):
        for one, all_rows in zip(fresh.batch(7 + i, 1), batch, strict=True):
            assert torch.equal(one[0], all_rows[i])


def test_the_mean_length_of_documents_is_that_of_the_rows(data):
    """The pairs of positions in the same document, counted in the rows that are read; only padding differs."""
    mixture, count = {"prose": 0.5, "code": 0.2, "chains": 0.3}, 2000
    ids = PackedSequences(data, mixture, LENGTH, seed=3).batch(0, count).document_ids
    pairs = (ids[:, :, None] == ids[:, None, :]).sum().item() / count
    assert mean_document_length(data, mixture, LENGTH) * LENGTH == pytest.approx(pairs, rel=0.03)
    whole = {"prose": 1.0, "chains": 0.0}  # documents of 100 positions in rows of 10
    assert mean_document_length(data, whole, 10) == 10
    with pytest.raises(ValueError, match="unknown source 'verse'"):
        mean_document_length(data, {"verse": 1.0}, LENGTH)


def num_rows(sequences: PackedSequences) -> int:
    """In one epoch of its only source."""
    (rows,) = sequences._rows
    return len(rows)


@pytest.mark.parametrize("source", ["prose", "chains"])
def test_seed_and_epoch_change_the_order_and_nothing_else(data, source):
    """The seed also changes which documents share a row; an epoch reads the same rows again."""
    first, second = (PackedSequences(data, {source: 1}, LENGTH, seed) for seed in (1, 2))
    rows = num_rows(first)
    epochs = [first.batch(0, rows), first.batch(rows, rows), second.batch(0, num_rows(second))]
    assert not torch.equal(epochs[0].input_ids, epochs[1].input_ids)
    as_sets = [{tuple(row) for row in epoch.input_ids.tolist()} for epoch in epochs]
    assert as_sets[0] == as_sets[1] and len(as_sets[0]) == rows and as_sets[0] != as_sets[2]
    assert sorted(documents_of(epochs[0])) == sorted(documents_of(epochs[2]))


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


def naive_parts(ids, room, too_long):
    """The parts of a document as (inputs, labels), token by token."""
    tokens = [*ids, EOS]
    if too_long == "drop" and len(tokens) - 1 > room:
        return []
    if too_long == "truncate":
        tokens = tokens[: room + 1]
    parts = []
    while len(tokens) > 1:
        labels = tokens[1 : room + 1]
        parts.append((tokens[: len(labels)], labels))
        tokens = tokens[room:]
    return parts


@pytest.mark.parametrize("too_long", TOO_LONG)
@pytest.mark.parametrize("name", ["plain", "masked"])
def test_an_epoch_has_every_part_of_every_document_once(tmp_path, too_long, name):
    documents = distinct_documents(300, 40, np.random.default_rng(1))
    data = write_data(tmp_path / "data", {name: (too_long, {"train": documents, "held_out": documents})})
    expected = [part for ids in documents for part in naive_parts(ids, LENGTH, too_long)]
    if name == "masked":
        expected = [(ids, [y if y % 2 == 1 else IGNORED_LABEL for y in labels]) for ids, labels in expected]
        expected = [(ids, labels) for ids, labels in expected if set(labels) != {IGNORED_LABEL}]
    sequences = PackedSequences(data, {name: 1}, LENGTH, seed=0)
    assert sorted(documents_of(sequences.batch(0, num_rows(sequences)))) == sorted(expected)
    held_out = [pair for batch in held_out_batches(data, name, LENGTH, 7) for pair in documents_of(batch)]
    assert sorted(trim(*pair) for pair in held_out) == sorted(trim(*pair) for pair in expected)


def trim(ids, labels):
    """Without the positions at the end that have no label: padding, or tokens that are not trained."""
    end = max(i for i, label in enumerate(labels) if label != IGNORED_LABEL) + 1
    return ids[:end], labels[:end]


def test_packing_wastes_little():
    lengths = np.random.default_rng(2).integers(10, 100, size=5000)
    offsets = np.concatenate([[0], np.cumsum(lengths + 1)])
    rows = packing.PackedRows(*packing.parts_of_documents(offsets, 256, "drop"), 256)
    assert len(rows) * 256 < 1.02 * lengths.sum()
    assert all(sum(length for _, length in rows.parts(row)) <= 256 for row in range(len(rows)))


def test_held_out_documents_stand_alone_in_their_rows(data):
    for source in ("prose", "chains"):
        for inputs, labels, numbers in held_out_batches(data, source, LENGTH, 4):
            live = labels != IGNORED_LABEL
            assert bool((live[:, :-1] >= live[:, 1:]).all())  # padding is at the end only
            assert inputs.shape[1] == int(live.sum(1).max()) and bool((numbers[live] == 0).all())
    predicted = torch.cat(
        [batch.labels[batch.labels != IGNORED_LABEL] for batch in held_out_batches(data, "prose", LENGTH, 4)]
    )
    tokens, starts = np.asarray(data.tokens("prose", "held_out")), data.offsets("prose", "held_out")[:-1]
    assert sorted(predicted.tolist()) == sorted(np.delete(tokens, starts).tolist())  # all but the first of a document


def test_held_out_stops_at_max_tokens(data):
    batches = list(held_out_batches(data, "prose", LENGTH, batch_size=2, max_tokens=3 * LENGTH))
    assert [len(batch.input_ids) for batch in batches] == [2, 1]


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
        ({"prose": 1}, 0, "sequence_length: got 0"),
        ({"chains": 1}, 1, "no document fits sequence_length 1, the shortest has 3 tokens"),
    ],
)
def test_what_cannot_be_packed_is_named(data, mixture, length, message):
    with pytest.raises(ValueError, match=message):
        PackedSequences(data, mixture, length, seed=0)


@pytest.mark.parametrize("vocab_size", [1 << 16, (1 << 16) + 1])
def test_tokens_take_the_smallest_type_and_stay_themselves(tmp_path, vocab_size):
    ids = [1, 7, vocab_size - 1]
    data = write_data(tmp_path / "data", {"prose": ("split", {"train": [ids]})}, vocab_size=vocab_size)
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
