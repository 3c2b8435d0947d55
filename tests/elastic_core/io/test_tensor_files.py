"""safetensors files in blocks: byte for byte those of safetensors; slices as `narrow` makes them; little memory."""

import errno
import itertools
import json
import os
import tracemalloc

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from elastic_core import ElasticModel, extract
from elastic_core.export.extract import SlicedTensor
from elastic_core.io import tensor_files
from elastic_core.io.tensor_files import Entry, read_header, write
from elastic_core.model import hf
from elastic_core.model.architectures.nemotron_h import disk_name
from elastic_core.model.dims import kept_rows, narrow
from tests.support.models.parents import random_config, random_elastic, random_ratios, random_submodel

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = {"b.x": (7,), "a.long": (301, 5), "c": (1, 900), "a.deep": (64, 1, 4), "none": (0, 3), 'é"': (2, 3)}


def draw(shapes, dtype_of):
    return {name: torch.randn(shape).to(dtype_of(i)) for i, (name, shape) in enumerate(shapes.items())}


def entries_of(tensors):
    return {name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


@pytest.mark.parametrize("block_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize("dtype", [*DTYPES, None])
def test_files_are_those_of_safetensors(tmp_path, monkeypatch, block_bytes, dtype):
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", block_bytes)
    tensors = draw(SHAPES, lambda i: dtype or DTYPES[i % 4])
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    for order in (list(tensors), list(tensors)[::-1]):
        path = tmp_path / "-".join(order[:1])
        write({path: entries_of(tensors)}, ((name, tensors[name]) for name in order))
        assert path.read_bytes() == (tmp_path / "theirs").read_bytes()
    for name, stored in read_header(tmp_path / "theirs").items():
        assert stored.entry == entries_of(tensors)[name]
        read = stored.read([(0, stored.entry.shape[0])])
        assert torch.equal(torch.from_numpy(read).view(stored.entry.dtype), tensors[name])


def test_small_files_have_the_permissions_of_new_files(tmp_path):
    """The library's own are readable by their owner only; then nobody else could serve a family."""
    tensors = {"a": torch.ones(3), "b": torch.zeros(2, 2, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "theirs", {"key": "value"})
    for _ in range(2):  # also over a file
        tensor_files.save(tensors, tmp_path / "ours", {"key": "value"})
    (tmp_path / "plain").touch()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_all_files_of_a_model_have_the_same_permissions(tmp_path):
    model = random_elastic(0)
    model.norm_gains = random_ratios(model.config)
    model.save_pretrained(tmp_path / "model")
    files = [file for file in (tmp_path / "model").rglob("*") if file.is_file()]
    assert len(files) > 2 and len({file.stat().st_mode for file in files}) == 1


def test_views_and_transposed_tensors_are_written_as_they_look(tmp_path):
    base = torch.arange(60.0).view(6, 10)
    tensors = {"view": base[1:4, ::2], "transposed": base.T}
    write({tmp_path / "m": entries_of(tensors)}, tensors.items())
    found = load_file(tmp_path / "m")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_what_is_missing_twice_or_of_another_shape_is_our_mistake(tmp_path):
    tensors = draw(SHAPES, lambda i: torch.float32)
    entries, items = entries_of(tensors), list(tensors.items())
    for number, given in enumerate((items[:-1], [("c", torch.zeros(1, 900, dtype=torch.float64)), *items[1:]])):
        with pytest.raises(AssertionError):
            write({tmp_path / str(number): entries}, given)


@pytest.mark.parametrize("whole", [False, True])
def test_a_full_disk_is_named(tmp_path, monkeypatch, whole):
    """Short writes are gone on with; the error is the system's, with the file's name."""
    pwrite, room = os.pwrite, itertools.count()

    def filling(file, data, offset):
        if not whole and next(room) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(file, data[:97], offset)

    monkeypatch.setattr(os, "pwrite", filling)
    tensors = draw({"a": (100, 9), "b": (50,)}, lambda i: torch.float32)
    if not whole:
        with pytest.raises(OSError, match=r"No space left.*model") as error:
            write({tmp_path / "model": entries_of(tensors)}, tensors.items())
        assert error.value.errno == errno.ENOSPC
        return
    write({tmp_path / "model": entries_of(tensors)}, tensors.items())
    assert all(torch.equal(t, tensors[name]) for name, t in load_file(tmp_path / "model").items())


def test_other_element_types_are_refused(tmp_path):
    save_file({"whole": torch.zeros(3, dtype=torch.int64)}, tmp_path / "m")
    with pytest.raises(ValueError, match=r"m: whole is stored as I64; allowed: F64, F32, BF16, F16"):
        read_header(tmp_path / "m")


# Slices


@pytest.mark.parametrize("block_bytes", [1, 700, 1 << 20])
@pytest.mark.parametrize("seed", range(4))
def test_slices_are_those_of_narrow(tmp_path, monkeypatch, seed, block_bytes):
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", block_bytes)
    model = random_elastic(seed)
    submodel = random_submodel(model.config, seed).resolve(model.config)
    model.save_pretrained(tmp_path / "parent")
    extract(tmp_path / "parent", submodel, tmp_path / "out")
    sizes, number = submodel.sizes(model.config), {layer: i for i, layer in enumerate(submodel.kept_layers)}
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, parameter in model.named_parameters():
        path = name.split(".")
        if path[1] == "layers":
            if int(path[2]) not in number:
                continue
            path[2] = str(number[int(path[2])])
        sliced = found.pop(disk_name(".".join(path)))
        assert torch.equal(sliced, narrow(parameter.detach(), model.layout[name], sizes)), name
    assert not found


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_zeros_follow_and_types_change_in_every_block(tmp_path, dtype):
    tensor = torch.randn(11, 6)
    save_file({"t": tensor}, tmp_path / "m")
    sliced = SlicedTensor(read_header(tmp_path / "m")["t"], [torch.tensor([0, 1, 4, 5, 6, 9]), 4], (9, 7), dtype)
    expected = F.pad(tensor[[0, 1, 4, 5, 6, 9], :4], (0, 3, 0, 3)).to(dtype or tensor.dtype)
    for start in range(9):
        for stop in range(start, 10):
            assert torch.equal(sliced[start:stop], expected[start:stop])


def test_only_kept_rows_are_read(tmp_path, monkeypatch):
    model = random_elastic(2)
    submodel = random_submodel(model.config, 2, all_layers=True).resolve(model.config)
    model.save_pretrained(tmp_path / "parent")
    read, kept = tensor_files.Stored.read, dict.fromkeys(model.layout, 0)

    def counting(self, runs):
        stored[self.offset] += sum(stop - start for start, stop in runs)
        return read(self, runs)

    reader = hf.TensorReader(tmp_path / "parent")
    stored = {reader.stored(name).offset: 0 for name in model.layout}
    monkeypatch.setattr(tensor_files.Stored, "read", counting)
    extract(tmp_path / "parent", submodel, tmp_path / "out")
    for name, dims in model.layout.items():
        rows = kept_rows(dims[0], submodel.sizes(model.config))
        kept[name] = rows if isinstance(rows, int) else len(rows)
    assert {name: stored[reader.stored(name).offset] for name in model.layout} == kept


def test_an_index_that_names_another_file_is_refused(tmp_path):
    random_elastic(1).save_pretrained(tmp_path / "parent")
    names = list(load_file(tmp_path / "parent" / "model.safetensors"))
    (tmp_path / "parent" / "model.safetensors").rename(tmp_path / "parent" / "first.safetensors")
    save_file({"other": torch.zeros(1)}, tmp_path / "parent" / "other.safetensors")
    index = {"weight_map": dict.fromkeys(names, "first.safetensors") | {names[0]: "other.safetensors"}}
    (tmp_path / "parent" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"other\.safetensors: does not hold"):
        extract(tmp_path / "parent", random_submodel(random_config(1), 1), tmp_path / "out")


def test_memory_is_a_few_blocks(tmp_path, monkeypatch):
    """Of a tensor of 8 MB some blocks are in memory, all of them numpy's, which tracemalloc sees."""
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", 1 << 16)
    config = random_config(3)
    config.vocab_size = 8_000_000 // (4 * config.hidden_size)
    ElasticModel(config).save_pretrained(tmp_path / "parent")
    submodel = random_submodel(config, 3)
    tracemalloc.start()
    extract(tmp_path / "parent", submodel, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000
