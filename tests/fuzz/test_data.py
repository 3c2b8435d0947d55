"""Data directories with broken manifests and arrays: read, or refused by one message that names the file."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_core.data.loader import PackedSequences, TokenData, held_out_batches
from elastic_core.data.token_files import Manifest, Source, Split, SplitWriter, Written
from elastic_core.errors import UserError
from tasks.corpora.preparation import FILE, Begun, Preparation
from tests.support.fuzzing import directories
from tests.support.fuzzing.broken import broken_bytes, broken_file
from tests.support.fuzzing.calls import call, examples

VOCAB, LENGTH = 32, 4


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("data")
    directory = scratch / "valid"
    directory.mkdir()
    manifest = Manifest(VOCAB, 0, 0, "no tokenizer", {})
    for name, too_long in (("prose", "split"), ("chains", "drop"), ("talk", "truncate")):
        splits = {}
        for split in ("train", "held_out"):
            writer = SplitWriter(directory, name, split, manifest.dtype, masked=name == "talk")
            documents = [[*range(1, 1 + size), 0] for size in (3, 2, 3, 1, 3)]
            masks = [[i % 2 == 0 for i in range(len(ids))] for ids in documents] if name == "talk" else None
            writer.append(documents, num_bytes=30, trained=masks)
            splits[split] = writer.close()
        manifest.sources[name] = Source(too_long, splits)
    manifest.write(directory)
    assert not isinstance(read(scratch, directory, "valid"), UserError)
    return scratch


def read(scratch, directory, target: str):
    def compute():
        data = TokenData(directory)
        sequences = PackedSequences(data, dict.fromkeys(data.manifest.sources, 1.0), LENGTH, seed=0)
        batches = [sequences.batch(0, 20)]
        for name in data.manifest.sources:
            batches += held_out_batches(data, name, LENGTH, 2)
        for inputs, labels, _ in batches:  # an id outside of the vocabulary would end training in an error of torch
            assert inputs.min() >= 0 and inputs.max() < data.manifest.vocab_size
            assert labels.max() < data.manifest.vocab_size

    return call(target, scratch, compute, directory)


@examples(24)
@given(data=st.data())
def test_manifest(scratch, data):
    directory = scratch / "valid"
    file = directory / "manifest.json"
    with directories.restored(file):
        file.write_bytes(data.draw(broken_file(json.loads(file.read_bytes()))))
        read(scratch, directory, "data manifest")


@examples(24)
@given(data=st.data())
def test_arrays(scratch, data):
    directory = directories.copy(scratch / "valid", scratch / "broken")
    file = data.draw(st.sampled_from(sorted(directory.glob("*.npy"))))
    file.write_bytes(data.draw(broken_bytes([file.read_bytes()])))
    read(scratch, directory, "data arrays")


@examples(16)
@given(data=st.data())
def test_values_of_arrays(scratch, data):
    directory = directories.copy(scratch / "valid", scratch / "broken")
    file = data.draw(st.sampled_from(sorted(directory.glob("*.npy"))))
    array = np.load(file)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(array) - 1))
        array[place] = data.draw(st.sampled_from([0, 1, VOCAB - 1, VOCAB, 60_000, int(array[-1]), int(array[0]) + 1]))
    if array.dtype == np.int64 and data.draw(st.booleans()):
        array[data.draw(st.integers(0, len(array) - 1))] = data.draw(st.sampled_from([-1, 2**62, -(2**63)]))
    np.save(file, array)
    read(scratch, directory, "data values")


@pytest.mark.parametrize(
    "name, place, value",
    [
        *(("prose.train.tokens.npy", 1, VOCAB), ("chains.held_out.tokens.npy", 2, 60_000)),
        *(("chains.train.offsets.npy", 1, value) for value in (-1, 0, 2**62)),
    ],
)
def test_values_that_were_found(scratch, name, place, value):
    directory = directories.copy(scratch / "valid", scratch / "broken")
    array = np.load(directory / name)
    array[place] = value
    np.save(directory / name, array)
    assert isinstance(read(scratch, directory, "found"), UserError)


def test_a_header_that_is_no_python(scratch):
    directory = directories.copy(scratch / "valid", scratch / "broken")
    file = directory / "prose.train.tokens.npy"
    file.write_bytes(file.read_bytes().replace(b"}", b"(", 1))
    assert isinstance(read(scratch, directory, "found"), UserError)


@pytest.mark.parametrize("change", [{"sources": {}}, {"vocab_size": 0}, {"eos_token_id": VOCAB}, {"bos_token_id": -1}])
def test_manifests_that_were_found(scratch, change):
    directory = directories.copy(scratch / "valid", scratch / "broken")
    values = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps(values | change))
    assert isinstance(read(scratch, directory, "found"), UserError)


@examples(12)
@given(data=st.data())
def test_unfinished_preparations(scratch, data):
    directory = scratch / "preparation"
    splits = {split: Split("a.npy", "b.npy", 3, 9, 1) for split in ("train", "held_out")}
    begun = Begun(3, 2, dict.fromkeys(splits, Written(3, 2, 9)))
    preparation = Preparation.load(directory).with_begun("prose", begun).with_finished("code", Source("split", splits))
    assert Preparation.load(directory) == preparation
    file = directory / FILE
    file.write_bytes(data.draw(broken_file(json.loads(file.read_text()))))
    call("preparation", scratch, lambda: Preparation.load(directory), directory)
    file.unlink()
