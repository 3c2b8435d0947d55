"""Uploads model directories to the Hugging Face hub, one commit each.

The token is what huggingface_hub finds: HF_TOKEN, or that of `hf auth login`. Messages name the status of an answer,
never its text, because that can contain addresses and secrets.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from elastic_core.errors import UserError
from elastic_core.export import elastic_checkpoint
from elastic_core.export.model_card import CARD, at_place
from elastic_core.io import provenance_file
from elastic_core.io.hub_errors import kind_of
from elastic_core.io.storage import StorageUnavailable
from elastic_core.io.tokenizer_files import PARENT_CARD, is_tokenizer_file
from elastic_core.model import norm_gains

SCHEME = "hf://"
NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Files of a model besides its tokenizer's. A pattern matches at the top of a repository only.
MODEL_FILES = {elastic_checkpoint.FILE, provenance_file.FILE, PARENT_CARD, norm_gains.RATIOS, norm_gains.BUDGETS}
MODEL_PATTERN = re.compile(r"[^/]+\.safetensors(\.index\.json)?|(modeling|configuration)_\w+\.py")
LOGIN = "set HF_TOKEN to a token that may write, or run `hf auth login`"


def push(
    directory: str | os.PathLike,
    repository: str,
    private: bool = True,
    revision: str | None = None,
    message: str = "Upload model",
    replaced: Mapping[str, bytes] | None = None,
) -> str:
    """Upload a model directory to a repository ("owner/name") of the hub, and return the URL of its page.

    - The repository is created if it does not exist: `private`, or for everyone.
    - `revision`: the branch, created if it does not exist (None: main).
    - `replaced`: contents for some files, in place of those in the directory.

    Hidden files and folders are not uploaded. The code in the model card is written to load the model from there. Files
    of an earlier model that this one does not have are removed in the same commit (see `is_model_file`). Raises
    UserError for a directory without config.json, an invalid name, a missing or wrong token, and for a public
    repository with `private`. Raises StorageUnavailable if the hub does not answer.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi  # here because the import is slow

    directory, replaced = Path(directory), dict(replaced or {})
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory}: no config.json, so it is no model; nothing was uploaded")
    check_name(repository)
    files = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    files = {name: path for name, path in files.items() if not re.search(r"(^|/)\.", name)}
    card = replaced.get(CARD, files[CARD].read_bytes() if CARD in files else None)
    if card is not None:
        text = card.decode(errors="surrogateescape")
        replaced[CARD] = at_place(text, repository, revision).encode(errors="surrogateescape")
    with hub_errors(repository):
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise UserError(f"{repository}: is public; name another repository, or allow it with --public")
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        there = api.list_repo_files(repository, revision=revision)
        added = [CommitOperationAdd(name, replaced.get(name, str(path))) for name, path in files.items()]
        added += [CommitOperationAdd(name, data) for name, data in replaced.items() if name not in files]
        kept = {operation.path_in_repo for operation in added}
        removed = [name for name in there if name not in kept and is_model_file(name)]
        operations = [*added, *(CommitOperationDelete(name) for name in removed)]
        api.create_commit(repository, operations, commit_message=message, revision=revision)
        url = f"{api.endpoint}/{repository}"
    return url if revision is None else f"{url}/tree/{revision}"


def is_model_file(name: str) -> bool:
    """Whether a file of a repository belongs to a model by its name, so that a later model replaces or removes it.

    These are weights and their index, configurations, the tokenizer and its chat templates, the code that loads the
    model, and what this library adds. All other files are the owner's, in whichever folder they are. A licence and a
    parser of answers count as the owner's, because their names are free.
    """
    return is_tokenizer_file(name) or name in MODEL_FILES or MODEL_PATTERN.fullmatch(name) is not None


def repository_of(destination: str, budget: str) -> str:
    """The repository of a budget at the destination "hf://owner/name": "owner/name-BUDGET". Raises UserError."""
    name = destination.removeprefix(SCHEME).strip("/")
    check_name(name)
    repository = f"{name}-{budget}"
    check_name(repository)
    return repository


def is_hub(destination: str | None) -> bool:
    """Whether a destination is on the hub."""
    return destination is not None and destination.lower().startswith(SCHEME)


def check_access(destination: str) -> None:
    """Raise UserError unless the token may write to the owner of "hf://owner/name". Uploads nothing, takes seconds."""
    from huggingface_hub import HfApi

    owner = repository_of(destination, "x").partition("/")[0]
    with hub_errors(destination):
        who = HfApi().whoami()
    names = [who["name"], *(org["name"] for org in who.get("orgs", ()))]
    if owner not in names:
        raise UserError(f"{destination}: the token is of {who['name']}; allowed owners: {', '.join(names)}; {LOGIN}")


def check_name(name: str) -> None:
    """Raise UserError unless `name` can be that of a repository."""
    if not NAME.fullmatch(name):
        raise UserError(f"{name!r} is no name on the hub; allowed: OWNER/NAME of letters, digits, '-', '_' and '.'")


@contextmanager
def hub_errors(where: str) -> Iterator[None]:
    """Raise errors of huggingface_hub and its HTTP library as UserError or StorageUnavailable, which name `where`."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    try:
        yield
    except UserError:
        raise
    except errors.OfflineModeIsEnabled:
        raise UserError(f"{where}: the hub may not be asked, because HF_HUB_OFFLINE is set") from None
    except errors.LocalTokenNotFoundError:
        raise UserError(f"{where}: no token for the hub; {LOGIN}") from None
    except errors.HFValidationError:
        raise UserError(f"{where}: the hub does not allow this name") from None
    except errors.HfHubHTTPError as error:
        status, kind = error.response.status_code, kind_of(error)
        if status in (401, 403):
            what = f"refuses the token (status {status}); {LOGIN}"
        elif kind is StorageUnavailable:
            what = f"does not answer (status {status}); try again later"
        else:
            what = f"refuses the request (status {status}); check the name"
        raise kind(f"{where}: the hub {what}") from None
    except ValueError:  # of huggingface_hub's own checks, and where the hub does not accept a card
        raise UserError(
            f"{where}: the hub does not accept the upload; check the metadata at the top of README.md"
        ) from None
    except (httpx.TransportError, ConnectionError, TimeoutError) as error:
        raise kind_of(error)(f"{where}: the hub cannot be reached ({type(error).__name__})") from None
