"""How far the preparation of data has come, in a file beside the unfinished token files.

Documents are read in parts. After each part, everything is on the disk. A preparation that is started again reads the
documents of finished parts once more, which is fast, and does not tokenise them again. The files get the same bits.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from elastic_core.config import load
from elastic_core.data.token_files import Source, Written
from elastic_core.io.atomic import write_text
from elastic_core.io.json_files import read_json

FILE = "progress.json"
PART_CHARACTERS = 1 << 26  # of one part; it takes seconds to tokenise


@dataclass(frozen=True)
class Begun:
    """The finished parts of one source: how many documents and characters, and what their splits hold.

    `skipped` and `notes` are what the encoder counted in these documents.
    """

    num_documents: int = 0
    num_characters: int = 0
    written: dict[str, Written] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Preparation:
    """The finished work of a preparation in `directory`. The methods that return a new value also write the file."""

    directory: Path
    has_tokenizer: bool = False
    begun: dict[str, Begun] = field(default_factory=dict)
    finished: dict[str, Source] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path) -> Preparation:
        """The work that is finished in a directory, which is created if it does not exist.

        Raises UserError for a damaged file.
        """
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / FILE).is_file():
            return cls(directory)
        return load(cls, read_json(directory / FILE) | {"directory": directory}, str(directory / FILE))

    def with_tokenizer(self) -> Preparation:
        """The tokenizer is complete."""
        return dataclasses.replace(self, has_tokenizer=True)._written()

    def with_begun(self, name: str, begun: Begun) -> Preparation:
        """Another part of the source `name` is complete."""
        return dataclasses.replace(self, begun=self.begun | {name: begun})._written()

    def with_finished(self, name: str, source: Source) -> Preparation:
        """The source `name` is complete."""
        return dataclasses.replace(self, finished=self.finished | {name: source})._written()

    def remove(self) -> None:
        """Remove the file, when everything is complete."""
        (self.directory / FILE).unlink()

    def _written(self) -> Preparation:
        content = {name: value for name, value in dataclasses.asdict(self).items() if name != "directory"}
        write_text(self.directory / FILE, json.dumps(content, indent=1) + "\n")
        return self


class Documents:
    """The documents of a source, (split, text or conversation), in parts. The first `skipped` of them are left out."""

    def __init__(self, documents: Iterator[tuple], skipped: int = 0):
        self._documents = islice(documents, skipped, None)
        self.number, self.ended = skipped, False

    def next_part(self) -> Iterator[tuple]:
        """Yield documents of about PART_CHARACTERS, and count them."""
        characters = 0
        for split, document in self._documents:
            self.number += 1
            characters += len(document)
            yield split, document
            if characters >= PART_CHARACTERS:
                return
        self.ended = True
