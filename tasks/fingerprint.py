"""Stage `fingerprint`: note the state of everything outside the checkout that decides results.

DVC runs this stage every time, because only it can see whether these inputs have changed. It is quick: see
elastic_core/io/fingerprints.py. A later stage runs again if the file that it depends on has changed:

- ``corpora.json``: the files of each source in section `prepare_data`, with its held-out files and its chat template
- ``parent.json``: the files of the parent at `parent.path`, or of its revision on the hub; ``tokenizer.json``: those of
  its tokenizer alone
- ``benchmarks.json``: the task files of section `evaluate.benchmarks`, and the data files that they name
- ``libraries.json``: the versions of the libraries that dvc.yaml lists
"""

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from ruamel.yaml import YAML

from elastic_core.errors import UserError
from elastic_core.io import storage
from elastic_core.io.atomic import write_text
from elastic_core.io.fingerprints import DigestCache, fingerprint
from elastic_core.io.json_files import read_json
from elastic_core.io.tokenizer_files import is_tokenizer_file
from tasks.corpora import hub_datasets
from tasks.corpora.benchmark_files import check_task_files, data_places
from tasks.corpora.sources import Source, paths_of
from tasks.parents import hub
from tasks.settings.load import load
from tasks.settings.local_checks import PACKAGE, is_package
from tasks.settings.paths import is_hub_name
from tasks.settings.schema import Params

OUT = Path("artifacts/inputs")
LIBRARIES = OUT / "libraries.json"
CACHE = Path("checkpoints/digests.json")


def main() -> None:
    settings, cache = load(), DigestCache(CACHE)
    for name, read in (("corpora", corpora), ("parent", parent), ("tokenizer", tokenizer), ("benchmarks", benchmarks)):
        write(OUT / f"{name}.json", lambda read=read: read(settings, cache))
    write(LIBRARIES, libraries)
    cache.save()


def write(path: Path, read: Callable[[], dict]) -> None:
    """Write fingerprints. If a server does not answer, the file of the last time stays, where there is one."""
    try:
        content = read()
    except storage.StorageUnavailable as error:
        if not path.is_file():
            raise
        print(f"{path}: is taken as unchanged, because its inputs cannot be seen: {error}")
        return
    write_text(path, json.dumps(content, indent=1) + "\n")


def corpora(settings: Params, cache: DigestCache) -> dict:
    """Source → field → fingerprint of its files, or name, revision and commit of a data set of the hub.

    Sources from packages have none: their versions are in libraries.json.
    """
    sources = settings.prepare_data.parsed_sources()
    before = _last(OUT / "corpora.json", {str: dict})
    found = {name: _fields(source, cache, before.get(name, {})) for name, source in sources.items()}
    return {name: fields for name, fields in found.items() if fields}


def _last(path: Path, shape=dict) -> dict:
    """The fingerprints of the last time, if they have this shape (see `read_json`)."""
    try:
        return read_json(path, shape=shape)
    except (OSError, UserError):  # it does not exist yet or is damaged
        return {}


def _fields(source: Source, cache: DigestCache, before: dict) -> dict:
    """Field → fingerprint. `before`: that of the last time."""
    fields = {}
    for name, value in paths_of(source).items():
        if name == "dataset" and not Path(value).is_dir():
            fields[name] = _hub_dataset(value, source.revision, before.get(name))
        else:
            fields[name] = fingerprint(value, cache)
    return fields


def _hub_dataset(name: str, revision: str | None, before: dict | None) -> dict:
    """Name and revision; of a branch or tag also the commit that it is at, or was at when the hub last told it."""
    given = {"name": name, "revision": revision}
    if hub.COMMIT.fullmatch(revision or ""):
        return given
    if (commit := hub_datasets.commit_of(name, revision)) is not None:
        return given | {"commit": commit}
    is_same = before is not None and given.items() <= before.items()
    return before if is_same else given


def parent(settings: Params, cache: DigestCache) -> dict:
    """The fingerprint of the parent's directory, or its package's version. Empty for a parent that is trained here."""
    return _parent(settings, cache, "parent", only=None)


def tokenizer(settings: Params, cache: DigestCache) -> dict:
    """The same for the files of the parent's tokenizer: other weights do not change the data."""
    return _parent(settings, cache, "tokenizer", only=is_tokenizer_file)


def _parent(settings: Params, cache: DigestCache, name: str, only: Callable[[str], bool] | None) -> dict:
    path = settings.parent.path
    if path is None:
        return {}
    if is_package(path):
        return {"package": path, "version": metadata.version(path.removeprefix(PACKAGE))}
    if is_hub_name(path):
        return hub.fingerprint(path, only, _last(OUT / f"{name}.json"))
    return fingerprint(path, cache, only)


def benchmarks(settings: Params, cache: DigestCache) -> dict:
    """The fingerprints of the task files, and of the data files that they name. Empty for lm-eval's own tasks."""
    if settings.evaluate.benchmarks is None or settings.evaluate.benchmarks.include is None:
        return {}
    section = settings.evaluate.benchmarks.located()
    include, root = Path(section.include), Path(section.data_root)
    leaves = check_task_files(include, section.tasks, root, "evaluate.benchmarks")
    names = sorted({name for leaf in leaves for name in data_places(leaf, root)})
    return {
        "tasks": fingerprint(section.include, cache),
        "data": {name: fingerprint(name if "://" in name else root / name, cache) for name in names},
    }


def libraries() -> dict:
    """Library → version, for all libraries that stages of dvc.yaml list (None: not installed)."""
    stages = YAML(typ="safe").load(Path("dvc.yaml"))["stages"].values()
    listed = {name for stage in stages for name in _listed(stage.get("do", stage))}
    return {name: _version(name) for name in sorted(listed)}


def _listed(stage: dict) -> list[str]:
    files = [entry for entry in stage.get("params", ()) if isinstance(entry, dict)]
    return [name for entry in files for name in entry.get(str(LIBRARIES), ())]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
