"""Names, configurations and tensors to and from Hugging Face directories of the `nemotron_h` family."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from transformers import NemotronHConfig

from elastic_core import storage, tensor_files
from elastic_core.layout import block_pattern, pattern_of
from elastic_core.submodel import PER_LAYER
from elastic_core.tensor_files import Entry, Rows, Stored

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
SHARD_BYTES = 5 * 2**30


def read_config(directory: str | os.PathLike) -> NemotronHConfig:
    """The configuration of a `nemotron_h` directory or URL, checked for what this library can express."""
    with storage.local_files(directory, ("config.json",)) as local:
        return _read_config(local, str(directory))


def _read_config(local: Path, directory: str) -> NemotronHConfig:
    path = local / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory}: no config.json; expected a Hugging Face directory of model_type nemotron_h")
    values = json.loads(path.read_text())
    if values.get("model_type") != "nemotron_h":
        raise ValueError(
            f"{directory}: model_type is {values.get('model_type')!r}; allowed: 'nemotron_h' "
            "(hybrid Mamba-2 / attention / MLP decoders)"
        )
    if any(isinstance(values.get(field), list) for field in PER_LAYER):
        raise ValueError(f"{directory}: a heterogeneous submodel cannot be a parent; use the model it was cut from")
    return check_config(NemotronHConfig.from_pretrained(local), directory)


def check_config(config, where: str = "config"):
    """Return `config` if every part of it is supported; raise ValueError naming the first that is not."""
    pattern = block_pattern(config)
    checks = [
        ("E" not in pattern, f"layer types {pattern!r}; mixture-of-experts layers (E) are not supported yet"),
        (not config.tie_word_embeddings, "tie_word_embeddings=true; transformers keeps nemotron_h heads untied"),
        (
            config.mamba_num_heads % config.n_groups == 0,
            f"mamba_num_heads={config.mamba_num_heads} is not a multiple of n_groups={config.n_groups}",
        ),
        (
            config.num_attention_heads % config.num_key_value_heads == 0,
            f"num_attention_heads={config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads={config.num_key_value_heads}",
        ),
        (config.mamba_hidden_act == "silu", f"mamba_hidden_act={config.mamba_hidden_act!r}; allowed: 'silu'"),
    ]
    for holds, problem in checks:
        if not holds:
            raise ValueError(f"{where}: {problem}")
    return config


def canonical_name(name: str) -> str:
    """transformers' parameter name of a tensor on disk, where the trunk is called ``backbone`` or ``model``."""
    return "model." + name.removeprefix("backbone.") if name.startswith("backbone.") else name


def disk_name(name: str) -> str:
    """The name that transformers and vLLM write and read."""
    return "backbone." + name.removeprefix("model.") if name.startswith("model.") else name


class TensorReader:
    """Lazy access to the tensors of a directory's safetensors files, by canonical name."""

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            files = json.loads(index.read_text())["weight_map"]
        elif (self.directory / "model.safetensors").is_file():
            with tensor_files.open_checked(self.directory / "model.safetensors") as file:
                files = dict.fromkeys(file.keys(), "model.safetensors")
        else:
            raise ValueError(f"{directory}: no model.safetensors and no model.safetensors.index.json")
        self.files = {canonical_name(name): (file, name) for name, file in files.items() if not name.startswith("mtp.")}
        self._headers: dict[str, dict[str, Stored]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor, mapped from its file, or some of its first dimension's rows: no others are read."""
        file, stored = self.files[name]
        with tensor_files.open_checked(self.directory / file) as handle:
            return handle.get_tensor(stored) if rows is None else handle.get_slice(stored)[rows]

    def stored(self, name: str) -> Stored:
        """Where a tensor lies; ValueError where its file is missing or broken, or does not hold it."""
        file, stored = self.files[name]
        if file not in self._headers:
            self._headers[file] = tensor_files.read_header(self.directory / file)
        if stored not in self._headers[file]:
            raise ValueError(f"{self.directory / file}: does not hold {stored}, as the index says; copy both again")
        return self._headers[file][stored]

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless the files hold exactly the named tensors."""
        missing, unknown = sorted(shapes.keys() - self.files.keys()), sorted(self.files.keys() - shapes.keys())
        if missing or unknown:
            raise ValueError(
                f"{self.directory}: tensors do not match config.json; "
                f"missing: {missing[:5]}, not expected: {unknown[:5]}"
            )
        for name, shape in shapes.items():
            found = self.stored(name).entry.shape
            if found != tuple(shape):
                raise ValueError(f"{self.directory}: {name} has shape {found}; config.json says {tuple(shape)}")


def write_tensors(
    directory: Path, entries: Mapping[str, Entry], tensors: Iterable[tuple[str, Rows]], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write tensors of the given `entries` as safetensors shards of at most `shard_bytes`, and their index.

    `tensors` are taken one by one, in any order: whole, or whatever gives their rows (see tensor_files.py).
    """
    shards, size = [{}], 0
    for name, entry in entries.items():
        if shards[-1] and size + entry.num_bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][disk_name(name)] = entry
        size += entry.num_bytes
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = ["model.safetensors"]
    named = ((disk_name(name), rows) for name, rows in tensors)
    tensor_files.write({directory / file: shard for file, shard in zip(files, shards, strict=True)}, named)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(entry.num_bytes for entry in entries.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_config(directory: Path, config, **changes) -> None:
    """Write config.json: the values of `config` with `changes`."""
    values = json.loads(config.to_json_string(use_diff=False))
    values.pop("auto_map", None)  # names modeling files that are not copied
    values |= {"architectures": ["NemotronHForCausalLM"], **changes}
    # vLLM and SGLang read the layers from these two, and fall back to another model's where they are missing.
    values["hybrid_override_pattern"] = pattern_of(values["layers_block_type"])
    values["num_hidden_layers"] = len(values["layers_block_type"])
    (directory / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def copy_tokenizer(source: str | os.PathLike, directory: Path) -> None:
    """Copy the tokenizer and generation files that `source` has."""
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, directory / name)


@contextmanager
def whole_directory(directory: str | os.PathLike) -> Iterator[Path]:
    """A directory that appears whole or not at all: yields one to fill beside it, and renames it at the end.

    Replaces an earlier model of the same name, and refuses to replace anything else. The earlier one steps aside and
    is dropped last; where a killed process left it aside, it comes back first.
    """
    final = Path(directory)
    partial, earlier = (final.with_name(f".{final.name}.{kind}") for kind in ("partial", "earlier"))
    _settle(final, partial, earlier)
    if final.exists() and not (final / "config.json").is_file() and not (final.is_dir() and not any(final.iterdir())):
        raise ValueError(f"{final}: exists and is no model directory; name another directory, or remove it")
    partial.mkdir(parents=True)
    try:
        yield partial
        if final.exists():
            os.replace(final, earlier)
        os.replace(partial, final)
    finally:
        _settle(final, partial, earlier)


def _settle(final: Path, partial: Path, earlier: Path) -> None:
    """Drop what is not whole; of two whole directories the new one stays."""
    shutil.rmtree(partial, ignore_errors=True)
    if earlier.exists():
        if final.exists():
            os.replace(earlier, partial)  # so that one which is half deleted is never taken for whole
            shutil.rmtree(partial)
        else:
            os.replace(earlier, final)
