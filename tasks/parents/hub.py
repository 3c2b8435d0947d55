"""Parents by their name on the Hugging Face hub: OWNER/NAME, or OWNER/NAME@REVISION with a commit, tag or branch.

The files stay in the hub's own cache on this machine. The library huggingface_hub continues a file after a broken
connection, and a download that was stopped file by file. It takes files from that cache if the hub does not answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from elastic_core.data.tokenizer import check_json_files
from elastic_core.errors import UserError, named
from elastic_core.io.hub_errors import SECONDS, kind_of
from elastic_core.io.tokenizer_files import (
    ADVICE,
    MORE_TEMPLATES,
    TOKENIZER_FILES,
    TOKENIZERS,
    is_companion,
    is_tokenizer_file,
)
from elastic_core.model.files.weights import INDEX, SHARD, SINGLE, weight_file_names

CARD = "README.md"  # tells the licence
COMMIT = re.compile("[0-9a-f]{40}")  # in full; a shorter name may be a branch
SMALL = ("config.json", *TOKENIZER_FILES, f"{MORE_TEMPLATES}/*.jinja", INDEX)  # all files but the weights


@dataclass(frozen=True)
class HubModel:
    """A model on the hub. `revision` is a commit, tag or branch (None: main)."""

    name: str
    revision: str | None

    @classmethod
    def parse(cls, path: str) -> HubModel:
        name, _, revision = path.partition("@")
        return cls(name, revision or None)


def fetch(path: str, *patterns: str) -> Path:
    """The directory in the hub's cache with the files that match the patterns, as far as the model has such files.

    Raises UserError for a model or revision that does not exist, one that is gated, and one that is not in the cache
    when the hub may not be asked, and StorageUnavailable for a hub that does not answer.
    """
    from huggingface_hub import snapshot_download  # imported here because the import is slow
    from tqdm.auto import tqdm

    class NoBar(tqdm):
        """Small files need no progress bar."""

        def __init__(self, *args, **options):
            super().__init__(*args, **{**options, "disable": True})

    model, bars = HubModel.parse(path), {"tqdm_class": NoBar} if set(patterns) <= set(SMALL) else {}
    with hub_errors(path):
        found = snapshot_download(model.name, revision=model.revision, allow_patterns=list(patterns), **bars)
    return Path(found)


def fetch_model(path: str) -> Path:
    """The directory in the hub's cache with configuration, tokenizer, weights, licence and parsers: what is needed.

    If the hub does not answer, licence and parsers are as far as the cache has them. Raises the same errors as
    `fetch`, and UserError for a model without safetensors files.
    """
    directory = fetch(path, *SMALL)
    pinned = at_commit(path, directory)
    files = listed(HubModel.parse(pinned))
    weights = _weight_files(directory, files, path)
    companions = [name for name in files or () if is_companion(name) or name == CARD]
    return fetch(pinned, *SMALL, *sorted(companions), *sorted(weights))


def check(path: str) -> Path | None:
    """The directory in the hub's cache if it is complete. Downloads all files but the weights.

    Raises UserError unless the hub, or its cache, has a model with a tokenizer and safetensors files.
    """
    directory = fetch(path, *SMALL)
    with named(path):
        if not any((directory / name).is_file() for name in TOKENIZERS):
            raise UserError(f"has no tokenizer ({' or '.join(TOKENIZERS)}); {ADVICE}")
        check_json_files(directory)
    weights = _weight_files(directory, listed(HubModel.parse(at_commit(path, directory))), path)
    return directory if all((directory / name).is_file() for name in weights) else None


def fingerprint(path: str, only: Callable[[str], bool] | None, before: dict) -> dict:
    """What changes if files of the model change: its name, and the digest of the digests that the hub tells.

    Of files that are neither the tokenizer's nor weights, nothing is seen. `only` says of a file whether it counts. A
    commit never changes, so the hub is not asked. If it does not answer: the files in the cache and, where it is not
    complete, `before`, the fingerprint of the last time.
    """
    model = HubModel.parse(path)
    given = {"name": model.name, "revision": model.revision}
    if COMMIT.fullmatch(model.revision or ""):
        return given
    files = listed(model)
    if files is None:
        files = _cached_files(path)
    if files is None:
        return before if given.items() <= before.items() else given
    counted = {name: files[name] for name in sorted(files) if _is_used(name) and (only is None or only(name))}
    size = sum(size for size, _ in counted.values())
    digest = sha256(json.dumps(counted).encode()).hexdigest()
    return given | {"files": len(counted), "bytes": size, "sha256": digest}


def listed(model: HubModel) -> dict[str, tuple[int, str]] | None:
    """The files of the model as the hub tells them now: name → (bytes, digest). None if it does not tell."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        info = HfApi().model_info(model.name, revision=model.revision, files_metadata=True, timeout=SECONDS)
    except (HTTPError, OSError, ValueError):
        return None
    return {file.rfilename: (file.size, file.lfs.sha256 if file.lfs else file.blob_id) for file in info.siblings}


def at_commit(path: str, directory: Path) -> str:
    """The path of the same model at the commit of a directory in the cache."""
    return f"{HubModel.parse(path).name}@{directory.name}"


def _is_used(name: str) -> bool:
    return is_tokenizer_file(name) or name in (SINGLE, INDEX) or SHARD.fullmatch(name) is not None


def _weight_files(directory: Path, files: Iterable[str] | None, path: str) -> set[str]:
    """The names of the files with weights, of the `files` that the hub tells of (None: of those in the cache)."""
    with named(path):
        if files is not None:
            return weight_file_names(directory, set(files), _conversion(at_commit(path, directory)))
        try:
            return weight_file_names(directory)
        except UserError as error:
            raise UserError(f"the hub does not answer, and {_not_cached()} ({error})") from None


def _conversion(path: str) -> str:
    """How to convert a model at a commit that has its weights only as PyTorch's files."""
    name, _, commit = path.partition("@")
    return (
        "convert them, and set parent.path to the new directory: "
        'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        f"[x.from_pretrained('{name}', revision='{commit}').save_pretrained('DIRECTORY') for x in (M, T)]\""
    )


def _cached_files(path: str) -> dict[str, tuple[int, str]] | None:
    """The files in the hub's cache, which names them by their digests. None if the weights are not complete."""
    from huggingface_hub import snapshot_download

    model = HubModel.parse(path)
    try:
        used = [*SMALL, SINGLE, "model-*.safetensors"]  # where a listing is cached too, these files have to be there
        found = snapshot_download(model.name, revision=model.revision, local_files_only=True, allow_patterns=used)
        directory = Path(found)
        weight_file_names(directory)
    except (OSError, ValueError):  # nothing is there, or only a part
        return None
    found = {}
    for file in (file for file in directory.rglob("*") if file.is_file()):
        digest = file.resolve().name if file.is_symlink() else directory.name  # a cache without links: the commit
        found[file.relative_to(directory).as_posix()] = (file.stat().st_size, digest)
    return found


@contextmanager
def hub_errors(path: str) -> Iterator[None]:
    """Say what a user can do about the errors of huggingface_hub."""
    from huggingface_hub import errors, is_offline_mode
    from huggingface_hub.utils import httpx

    name, revision = HubModel.parse(path).name, HubModel.parse(path).revision
    log_in = "log in (`hf auth login`, or HF_TOKEN in the environment)"
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"{path}: is gated: accept its terms at https://huggingface.co/{name}, and {log_in} with that account"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{path}: no such directory, and the hub has no model of this name, or a private one; "
            f"correct the name, or {log_in}"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{path}: {name} has no commit, tag or branch {revision!r} on the hub") from None
    except errors.LocalEntryNotFoundError as error:
        why = "and the hub may not be asked (HF_HUB_OFFLINE)" if is_offline_mode() else "and the hub cannot be reached"
        raise kind_of(error)(f"{path}: no such directory, {why}, and {_not_cached()}") from None
    except (errors.HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise kind_of(error)(f"{path}: cannot be downloaded: {reason}") from None


def _not_cached() -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    return (
        f"not all files that are needed are in its cache, {HF_HUB_CACHE} (HF_HUB_CACHE); "
        "give a local directory, or download the model first (`hf download`)"
    )
