"""Checks of the URLs in params.yaml: corpora, the parent, the locations of checkpoints and of exports.

Reading params.yaml connects to no server. A stage that needs no server therefore runs even when a server is down. A
stage that uses a remote location checks it here first, within seconds. `python -m tasks.commands.check` checks all.
"""

from collections.abc import Iterable, Mapping

from elastic_core.config import ConfigError, Problems
from elastic_core.errors import UserError, named
from elastic_core.export import hub
from elastic_core.io import storage
from tasks.corpora.sources import PATHS
from tasks.settings.load import FILE
from tasks.settings.local_checks import TOKENIZERS
from tasks.settings.schema import Params


def check(settings: Params, *sections: str, where: str = FILE) -> None:
    """Check the remote locations in the named sections: prepare_data, parent, extract, compute. Without names, in all.

    `where` is the start of every error message. Raises ConfigError for a location that cannot be used, and
    StorageUnavailable for a server that does not answer. Both name the parameter.
    """
    problems = Problems()
    with named(where):
        add_problems(problems, settings, sections)
        problems.raise_all()


def add_problems(problems: Problems, settings, sections: Iterable[str] = ()) -> None:
    """The same for `settings` that may lack sections. Raises StorageUnavailable for the first silent server."""
    for section in sections or CHECKS:
        if hasattr(settings, section):
            with problems.collecting():
                CHECKS[section](settings)


def _check_corpora(settings: Params) -> None:
    problems = Problems()
    for name, source in settings.prepare_data.sources.items():
        values = source if isinstance(source, Mapping) else {}  # a section that could not be read is named elsewhere
        for field in PATHS:
            if storage.is_url(path := values.get(field)):
                with problems.collecting():
                    _check_access(path, f"prepare_data.sources.{name}.{field}", writing=False)
    problems.raise_all()


def _check_parent(settings: Params) -> None:
    path = settings.parent.path
    if not storage.is_url(path):  # local_checks.py has checked it
        return
    key = "parent.path"
    _check_access(path, key, writing=False)
    names = storage.list_names(path)
    if "config.json" not in names:
        raise ConfigError(f"{key}: got {path!r}; allowed: a Hugging Face directory with a config.json, or null")
    if not set(TOKENIZERS) & set(names):
        allowed = f"a directory with its tokenizer too ({' or '.join(TOKENIZERS)})"
        raise ConfigError(f"{key}: got {path!r}; allowed: {allowed}")


def _check_destination(settings: Params) -> None:
    if hub.is_hub(settings.extract.destination):
        try:
            hub.check_access(settings.extract.destination)
        except storage.StorageUnavailable as error:
            raise storage.StorageUnavailable(f"extract.destination: {error}") from None
        except UserError as error:
            raise ConfigError(f"extract.destination: {error}") from None
    elif settings.extract.destination:
        _check_access(settings.extract.destination, "extract.destination", writing=True)


def _check_checkpoints(settings: Params) -> None:
    if storage.is_url(settings.compute.storage):
        _check_access(settings.compute.storage, "compute.storage", writing=True)


def _check_access(location: str, key: str, writing: bool) -> None:
    try:
        storage.check_access(location, writing)
    except storage.StorageUnavailable as error:
        raise storage.StorageUnavailable(f"{key}: {error}") from None
    except storage.StorageError as error:
        raise ConfigError(f"{key}: {error}") from None


CHECKS = {  # section → its check
    "prepare_data": _check_corpora,
    "parent": _check_parent,
    "extract": _check_destination,
    "compute": _check_checkpoints,
}
