"""What params.yaml names outside of this machine: corpora, the parent, where checkpoints and exports go.

Reading params.yaml asks no server, so a stage that needs none runs also while a server is away. The stages that use a
place check it here, within seconds; `python -m tasks.commands.check` checks all of them.
"""

from elastic_core.config import ConfigError
from elastic_core.io import storage
from tasks.settings.load import FILE
from tasks.settings.local_checks import TOKENIZERS
from tasks.settings.schema import Params


def check(settings: Params, *sections: str, where: str = FILE) -> None:
    """Check the places of the named sections (of all, where none is named).

    Raises ConfigError naming the key, or StorageUnavailable, of which the same is true.
    """
    checks = {
        "prepare_data": _check_corpora,
        "parent": _check_parent,
        "extract": _check_destination,
        "compute": _check_checkpoints,
    }
    for section in sections or checks:
        checks[section](settings, where)


def _check_corpora(settings: Params, where: str) -> None:
    for name, source in settings.prepare_data.sources.items():
        if storage.is_url(path := source.get("path")):
            _check_access(path, f"{where}: prepare_data.sources.{name}.path", writing=False)


def _check_parent(settings: Params, where: str) -> None:
    path = settings.parent.path
    if not storage.is_url(path):  # checked with the rest of params.yaml
        return
    key = f"{where}: parent.path"
    _check_access(path, key, writing=False)
    names = storage.list_names(path)
    if "config.json" not in names:
        raise ConfigError(f"{key}: got {path!r}; allowed: a Hugging Face directory with a config.json, or null")
    if not set(TOKENIZERS) & set(names):
        allowed = f"a directory with its tokenizer too ({' or '.join(TOKENIZERS)})"
        raise ConfigError(f"{key}: got {path!r}; allowed: {allowed}")


def _check_destination(settings: Params, where: str) -> None:
    if settings.extract.destination is not None:
        _check_access(settings.extract.destination, f"{where}: extract.destination", writing=True)


def _check_checkpoints(settings: Params, where: str) -> None:
    if storage.is_url(settings.compute.storage):
        _check_access(settings.compute.storage, f"{where}: compute.storage", writing=True)


def _check_access(place: str, key: str, writing: bool) -> None:
    try:
        storage.check_access(place, writing)
    except storage.StorageUnavailable as error:
        raise storage.StorageUnavailable(f"{key}: {error}") from None
    except storage.StorageError as error:
        raise ConfigError(f"{key}: {error}") from None
