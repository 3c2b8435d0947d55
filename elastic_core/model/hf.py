"""Read and write configurations and tensors of Hugging Face directories. Names depend on the architecture."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedConfig

from elastic_core.errors import UserError
from elastic_core.io import storage, tensor_files
from elastic_core.io.directory_transfer import local_files
from elastic_core.io.filesystem import Location
from elastic_core.io.json_files import check_numbers, read_json
from elastic_core.io.tensor_files import Entry, Rows, Stored
from elastic_core.io.tensor_headers import read_raw_header
from elastic_core.model import architectures
from elastic_core.model.architectures import HEAD
from elastic_core.model.axes import PER_LAYER
from elastic_core.model.files.experts import StoredStack, is_stacked, matrix_name, place_in_stack
from elastic_core.model.files.weights import SHARD_BYTES, weight_map

# Configuration values that have to be 1 or more, as far as an architecture has them.
SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("n_groups", "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "conv_kernel", "intermediate_size"),
)
# The largest allowed values. Memory and time grow with some of them before any weight is read.
MOST_LAYERS, MOST_CHANNELS, MOST = 1_000, 1 << 16, (1 << 31) - 1
LIMITS = {"num_hidden_layers": MOST_LAYERS, "head_dim": MOST_CHANNELS, "conv_kernel": MOST_CHANNELS}
BLOCK_BYTES = 1 << 24  # of two tensors that are compared


# The exceptions of transformers' configuration classes for values of a wrong type or size.
CONFIG_ERRORS = (StrictDataclassError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


@contextmanager
def errors_of_transformers(directory: Location) -> Iterator[None]:
    """Raise UserError where transformers fails: the weights have been checked, so it is the values in other files."""
    try:
        yield
    except UserError:
        raise
    except CONFIG_ERRORS as error:
        raise UserError(
            f"{directory}: transformers cannot use it ({type(error).__name__}: {error}); correct "
            "generation_config.json or config.json, or copy them again"
        ) from None


def read_config(directory: Location) -> PreTrainedConfig:
    """Read the configuration of a directory or URL and check that this library supports it; else raise UserError."""
    with local_files(directory, lambda name: name == "config.json") as local:
        return _read_config(local, str(directory))


def _read_config(local: Path, directory: str) -> PreTrainedConfig:
    values = read_values(local, directory)
    if any(isinstance(values.get(field), list) for field in PER_LAYER):
        raise UserError(f"{directory}: a heterogeneous submodel cannot be a parent; use the model it comes from")
    if values.get("per_layer_config"):  # of transformers
        raise UserError(f"{directory}: has a per_layer_config; allowed: a parent whose layers of a type are equal")
    return build_config(values, directory, lambda config_class: config_class.from_pretrained(local))


def build_config(values: Mapping, directory: str, build: Callable[[type], PreTrainedConfig]) -> PreTrainedConfig:
    """The configuration that `build(class)` makes of the `values` in a directory's config.json, checked.

    Raises UserError for values that transformers or this library do not accept.
    """
    config_class = architectures.config_class(values.get("model_type"), directory)
    where = f"{directory}/config.json"
    check_numbers(values, where)
    for name in SIZES:  # before transformers makes lists of these lengths
        _check_size(name, values.get(name), where)
    try:
        config = build(config_class)
        return check_config(config, directory)
    except UserError:
        raise
    except CONFIG_ERRORS as error:
        text = " ".join(str(error).split())
        raise UserError(f"{where}: transformers does not accept it: {text}") from None


def read_values(local: Path, directory: str) -> dict:
    """The values in config.json. Raises UserError if the file does not exist or is damaged."""
    path = local / "config.json"
    if not path.is_file():
        raise UserError(
            f"{directory}: no config.json; expected a Hugging Face directory of model_type "
            f"{' or '.join(architectures.ARCHITECTURES)}"
        )
    return read_json(path, f"{directory}/config.json")


def _values_at(directory: Location) -> dict:
    with local_files(directory, lambda name: name == "config.json") as local:
        return read_values(local, str(directory))


def check_config(config, where: str = "config"):
    """Return `config` if this library supports it. Otherwise raise UserError with the first problem."""
    for name in SIZES:
        _check_size(name, getattr(config, name, None), where)
    if architectures.num_layers(config) > MOST_LAYERS:
        raise UserError(f"{where}: got {architectures.num_layers(config):,} layers; allowed: 1 to {MOST_LAYERS:,}")
    for holds, problem in architectures.find(config.model_type, where).requirements(config):
        if not holds:
            raise UserError(f"{where}: {problem}")
    return config


def _check_size(name: str, size, where: str) -> None:
    most = LIMITS.get(name, MOST)
    if isinstance(size, (int, float)) and not 1 <= size <= most:
        raise UserError(f"{where}: {name}={size}; allowed: 1 to {most:,}")


class TensorReader:
    """Reads tensors of a directory's safetensors files by canonical name (the name of the parameter), when asked.

    `files[name]` is the position of a tensor: (file, name in the file). `stacks[name]` has the positions of all experts
    of a stack that is stored as one matrix for each expert (files/experts.py). `all_files` has the names of all files.
    A URL is possible too, for `check` and `stored`, which read only headers.
    Raises UserError for a directory without safetensors files, or of an unknown architecture.
    """

    def __init__(self, directory: Location):
        self.directory = directory
        found = weight_map(directory)
        self.all_files = sorted(set(found.values()))
        self.config_values = _values_at(directory)
        canonical_name = architectures.find(self.config_values.get("model_type"), str(directory)).canonical_name
        named = ((canonical_name(name), (file, name)) for name, file in found.items())
        self.files = {name: position for name, position in named if name is not None}
        self.stacks = self._take_stacks()
        self._headers: dict[str, dict[str, Stored]] = {}

    @property
    def has_tied_head(self) -> bool:
        """Whether the files hold a head although the configuration says that it is the embeddings."""
        return HEAD in self.files and self.config_values.get("tie_word_embeddings") is True

    def untie(self, embeddings: str) -> None:
        """Read the head from the embeddings, if the configuration ties the two."""
        if HEAD not in self.files and self.config_values.get("tie_word_embeddings") is True:
            self.files[HEAD] = self.files[embeddings]

    def _take_stacks(self) -> dict[str, list[tuple[str, str]]]:
        """Move the matrices of experts out of `files`: name of the stack → positions in the order of the experts."""
        found: dict[str, dict[int, tuple[str, str]]] = {}
        for name in list(self.files):
            if (position := place_in_stack(name)) is not None:
                stack, number = position
                found.setdefault(stack, {})[number] = self.files.pop(name)
        for name, experts in found.items():
            if sorted(experts) != list(range(len(experts))):
                missing = sorted(set(range(max(experts))) - set(experts))
                raise UserError(f"{self.directory}: {name} lacks experts {missing[:5]}; copy the model again")
        return {name: [experts[i] for i in range(len(experts))] for name, experts in found.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.files or name in self.stacks

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Read one tensor, memory-mapped, or only some rows of its first dimension. No other rows are read."""
        if name in self.stacks:
            experts = [self._open(file, stored) for file, stored in self.stacks[name][rows or slice(None)]]
            entry = self.stored(name).entry
            return torch.stack(experts) if experts else torch.empty((0, *entry.shape[1:]), dtype=entry.dtype)
        return self._open(*self.files[name], rows)

    def _open(self, file: str, stored: str, rows: slice | None = None) -> Tensor:
        with tensor_files.open_checked(Path(self.directory) / file) as handle:
            return handle.get_tensor(stored) if rows is None else handle.get_slice(stored)[rows]

    def stored(self, name: str) -> Stored | StoredStack:
        """The position of a tensor. Raises UserError for a missing or damaged file, or a file without the tensor."""
        if name not in self.stacks:
            return self._stored(*self.files[name])
        experts = tuple(self._stored(file, stored) for file, stored in self.stacks[name])
        if len({expert.entry for expert in experts}) > 1:
            raise UserError(f"{self.directory}: the experts of {name} differ in shape or element type")
        return StoredStack(experts)

    def _stored(self, file: str, stored: str) -> Stored:
        if file not in self._headers:
            self._headers[file] = tensor_files.read_header(storage.join(self.directory, file))
        if stored not in self._headers[file]:
            raise UserError(
                f"{storage.join(self.directory, file)}: does not hold {stored}, but the index says so; copy both again"
            )
        return self._headers[file][stored]

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise UserError unless the files hold exactly these tensors with these shapes. Reads only headers.

        A head beside tied embeddings is accepted here (see `check_tied_head`).
        """
        found = self.files.keys() | self.stacks.keys()
        missing, unknown = sorted(shapes.keys() - found), sorted(found - shapes.keys())
        if unknown == [HEAD] and self.has_tied_head:
            unknown = []
        if missing == [HEAD] and not unknown:
            raise UserError(
                f"{self.directory}: no {HEAD}, and tie_word_embeddings is false: transformers draws a random head. "
                "If the head is the embeddings, set tie_word_embeddings to true in config.json. Otherwise copy the "
                "model again"
            )
        if missing or unknown:
            raise UserError(
                f"{self.directory}: tensors do not match config.json; "
                f"missing: {missing[:5]}, not expected: {unknown[:5]}"
            )
        for name, shape in shapes.items():
            found = self.stored(name).entry.shape
            if found != tuple(shape):
                raise UserError(f"{self.directory}: {name} has shape {found}; config.json says {tuple(shape)}")
        for file in set(self.all_files) - self._headers.keys():  # no tensor of it is used, but a copy has to be whole
            read_raw_header(storage.join(self.directory, file))

    def check_tied_head(self, embeddings: str) -> None:
        """Raise UserError if the files hold a head beside tied embeddings that differs from them.

        transformers does not tie such a head, although the configuration says so. Memory holds some rows at a time.
        """
        if not self.has_tied_head:
            return
        head, tied = self.stored(HEAD).entry, self.stored(embeddings).entry
        step = max(1, BLOCK_BYTES // max(1, tied.row_bytes))
        if head.shape == tied.shape and all(
            torch.equal(self.read(HEAD, rows), self.read(embeddings, rows).to(head.dtype))
            for rows in (slice(start, start + step) for start in range(0, tied.shape[0], step))
        ):
            return
        raise UserError(
            f"{self.directory}: {HEAD} differs from {embeddings}, but tie_word_embeddings is true. transformers keeps "
            f"both then: to do so, set tie_word_embeddings to false in config.json. To tie them, remove {HEAD}"
        )


def write_tensors(
    directory: Path, entries: Mapping[str, Entry], tensors: Iterable[tuple[str, Rows]], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write safetensors shards of at most `shard_bytes` each, and their index if there are several.

    `entries` and `tensors` use the names in files. `tensors` come in any order, each as a tensor or as `Rows` (see
    tensor_files.py).
    """
    shards, size = [{}], 0
    for name, entry in entries.items():
        if shards[-1] and size + entry.num_bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += entry.num_bytes
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = ["model.safetensors"]
    tensor_files.write({directory / file: shard for file, shard in zip(files, shards, strict=True)}, tensors)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(entry.num_bytes for entry in entries.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def disk_entries(name: str, entry: Entry, disk_name: Callable[[str], str]) -> dict[str, Entry]:
    """The tensors of one parameter in files: name in the file → entry. A stack has one matrix for each expert."""
    if not is_stacked(name):
        return {disk_name(name): entry}
    matrix = Entry(entry.dtype, entry.shape[1:])
    return {disk_name(matrix_name(name, number)): matrix for number in range(entry.shape[0])}


def disk_tensors(name: str, tensor: Tensor, disk_name: Callable[[str], str]) -> Iterator[tuple[str, Tensor]]:
    """The same tensors as `disk_entries`: (name in the file, tensor)."""
    if not is_stacked(name):
        yield disk_name(name), tensor
    else:
        for number, matrix in enumerate(tensor):
            yield disk_name(matrix_name(name, number)), matrix


def write_config(directory: Path, config, **changes) -> None:
    """Write config.json with the values of `config` and `changes`."""
    values = json.loads(config.to_json_string(use_diff=False))
    values.pop("auto_map", None)  # it names modeling files that are not copied
    architecture = architectures.of(config)
    values |= {"architectures": [architecture.MODELS[config.model_type][1]], **changes}
    values = architecture.file_values(values)
    (directory / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
