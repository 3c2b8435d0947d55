"""Reads data sets of the Hugging Face hub row by row with the library `datasets`, also from caches and directories."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from elastic_core.errors import UserError
from elastic_core.io.hub_errors import SECONDS, kind_of
from tasks.corpora.text_files import without_nulls


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit that a branch or tag of a data set on the hub is at now (None: main). None if the hub does not tell.

    The hub does not tell it offline, and of a data set or revision that it does not have.
    """
    from huggingface_hub import HfApi  # imported here because the import is slow
    from huggingface_hub.errors import HTTPError  # the base of what its HTTP library raises

    try:
        return HfApi().dataset_info(name, revision=revision, timeout=SECONDS).sha
    except (HTTPError, OSError, ValueError):
        return None


@dataclass(frozen=True)
class HubDataset:
    """A data set by its name on the hub, such as "openai/gsm8k", or a local directory with one.

    `config` is the name of one of its configurations, and `revision` a commit, tag or branch (None: main).
    """

    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None

    def __str__(self) -> str:
        details = [self.config, self.split, self.revision]
        return f"dataset {self.name} ({', '.join(str(part) for part in details if part)})"

    def rows(self, fields: Iterable[str] = ()) -> Iterator[tuple[str, dict]]:
        """Yield (place, row). Rows are streamed; if the hub cannot be reached, they are read from a local cache.

        Nulls inside a row are left out, but for those of `fields`.

        Raises UserError for a data set, configuration or split that does not exist, and StorageUnavailable for a hub
        that does not answer, if the data set is in no cache.
        """
        from datasets.exceptions import DatasetsError  # imported here because the import is slow
        from huggingface_hub.utils import httpx

        # datasets raises a RuntimeError where it finds a script instead of rows.
        errors = (DatasetsError, httpx.HTTPError, OSError, ValueError, LookupError, RuntimeError)
        try:
            for number, row in enumerate(self._open(), 1):
                yield f"{self}, row {number}", without_nulls(row, fields)
        except UserError:
            raise
        except errors as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise kind_of(error)(f"{self}: cannot be read: {reason}") from None

    def _open(self):
        import datasets
        from huggingface_hub.utils import httpx

        if Path(self.name).is_dir():
            if (Path(self.name) / "dataset_dict.json").is_file():  # written by save_to_disk
                return datasets.load_from_disk(os.path.join(self.name, self.split))
            if (Path(self.name) / "state.json").is_file():
                return datasets.load_from_disk(self.name)
            return datasets.load_dataset(self.name, self.config, split=self.split, streaming=True)
        try:
            return datasets.load_dataset(
                self.name, self.config, split=self.split, revision=self.revision, streaming=True
            )
        except (ConnectionError, httpx.TransportError, datasets.exceptions.DatasetNotFoundError) as error:
            # Not found: also what a data set gives that is in the hub's cache, when the hub cannot be asked.
            return self._open_cached(error)

    def _open_cached(self, error: Exception):
        import datasets
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
        from huggingface_hub.utils import httpx

        try:
            directory = snapshot_download(self.name, repo_type="dataset", revision=self.revision, local_files_only=True)
            return datasets.load_dataset(directory, self.config, split=self.split, streaming=True)
        except LocalEntryNotFoundError:
            pass
        offline = datasets.DownloadConfig(local_files_only=True)
        try:
            return datasets.load_dataset(
                self.name, self.config, split=self.split, revision=self.revision, download_config=offline
            )
        except (ConnectionError, httpx.TransportError, datasets.exceptions.DatasetNotFoundError, FileNotFoundError):
            reason = " ".join(str(error).split()) or type(error).__name__
            raise kind_of(error)(
                f"{self}: cannot be reached ({reason}), and is in no local cache (HF_DATASETS_CACHE, HF_HUB_CACHE); "
                "check the name and the connection, or give a local directory"
            ) from None
