"""Where the rows of a source come from, files or a data set of the hub, and which of them are held out."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elastic_core.config import Require
from elastic_core.errors import UserError
from elastic_core.io import storage
from tasks.corpora.hub_datasets import HubDataset
from tasks.corpora.json_rows import Field, Row, find_field
from tasks.corpora.text_files import check_format, is_compressed, read_rows

_CHARACTERS_PER_COMPRESSED_BYTE = 3  # of common text, roughly
OVERLAPS = "training documents that are held out too"


@dataclass(frozen=True)
class Input:
    """Files that match a glob, `path`, or else a data set of the hub."""

    path: str | None
    dataset: HubDataset | None = None

    def rows(self, field: Field) -> Iterator[Row]:
        """Yield (place, value) for each row: the value of `field`, or the whole row if `field` is a tuple of fields.

        Raises UserError, which names the file and the line or row, for what cannot be read. Raises StorageError for a
        URL that cannot be read.
        """
        if self.path is None:
            for place, row in self.dataset.rows(field if isinstance(field, tuple) else (field,)):
                yield place, row if isinstance(field, tuple) else find_field(row, field, place)
        else:
            for path in self.paths():
                yield from read_rows(path, field)

    def expected_characters(self) -> int | None:
        """Estimate the number of characters of all rows. None for a data set: nobody says how large it is."""
        if self.path is None:
            return None
        sizes = self.paths().items()
        return sum(size * (_CHARACTERS_PER_COMPRESSED_BYTE if is_compressed(path) else 1) for path, size in sizes)

    def paths(self) -> dict[str, int]:
        """The files that `path` matches, in the order of their names: name → size in bytes. No file is opened.

        Raises UserError if there is none, and for a file of a format that cannot be read, without permission to read it
        or behind a broken link.
        """
        if self.path is None:
            return {}
        paths = storage.glob(self.path)
        if not paths:
            raise UserError(f"path {self.path!r}: {self._why_nothing_matches()}")
        for path in paths:
            check_format(path)
            if not storage.is_url(path) and not os.access(path, os.R_OK):
                raise UserError(f"{path}: no permission to read it")
        return paths

    def __str__(self) -> str:
        return f"path {self.path!r}" if self.path is not None else str(self.dataset)

    def _why_nothing_matches(self) -> str:
        is_url = storage.is_url(self.path)
        if bool(storage.list_names(self.path)) if is_url else Path(self.path).is_dir():
            return f"a directory; name its files, such as {storage.join(self.path, '**', '*.jsonl')!r}"
        return "no file matches it" + ("" if is_url else f" (relative to {Path.cwd()})")


class Splitter:
    """Says for each document whether it is held out, and counts training documents that are held out too.

    - `share` of the documents are held out, chosen by a hash of their text or of their group. With `has_own_files`,
      the held-out documents come from files of their own, and all others are training.
    - `notes` gets the number of overlaps.
    """

    def __init__(self, share: float, has_own_files: bool, notes: Counter):
        self._limit, self._has_own_files, self._notes = int(share * 2**64), has_own_files, notes
        self._held_out: set[bytes] = set()

    def held_out(self, digest: bytes) -> str:
        """The split of a document of the held-out files. `digest`: of its text, as `digest_of` gives it."""
        self._held_out.add(digest[:16])
        return "held_out"

    def split(self, digest: bytes, group: str | None) -> str:
        """The split of another document."""
        if self._has_own_files:
            self._notes[OVERLAPS] += digest[:16] in self._held_out
            return "train"
        if group is not None:
            digest = digest_of(group)
        return "held_out" if int.from_bytes(digest[:8], "big") < self._limit else "train"


def digest_of(text: str) -> bytes:
    """The SHA-256 of a text in UTF-8. Raises UnicodeEncodeError for half of a surrogate pair."""
    return hashlib.sha256(text.encode()).digest()


def group_of(row: dict, group_field: str | None, place: str) -> str | None:
    """The group of a row as a text; None without `group_field` and for a null.

    Raises UserError for a row without this field.
    """
    if group_field is None:
        return None
    value = find_field(row, group_field, place, "group_field")
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True, default=str)


def check_input(source, require: Require) -> None:
    """Check the fields that Files and Conversations share."""
    has_one = (source.path is None) != (source.dataset is None)
    require(has_one, "path", source.path, "either `path`, a glob of files, or `dataset`, a name on the hub")
    if source.dataset is None:
        for name in ("config", "revision"):
            require(getattr(source, name) is None, name, getattr(source, name), "null without `dataset`")
    own, share = source.held_out_path is not None, source.held_out
    if own:
        require(share in (0, type(source).held_out), "held_out", share, "0 or nothing, because held_out_path is given")
        allowed = "null, because held_out_path decides what is held out"
        require(source.group_field is None, "group_field", source.group_field, allowed)
    else:
        require(0 < share < 1, "held_out", share, "more than 0 and less than 1; 0 only with held_out_path")
