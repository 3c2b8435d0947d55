"""Reads files of text row by row: .txt, .jsonl and .json, each also compressed with gzip or zstd, and .parquet.

Only a part of a file is in memory at a time. Every value comes with its place, so that a message can name it.
"""

import codecs
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import TextIO

from elastic_core.errors import UserError
from elastic_core.io import storage
from tasks.corpora import json_rows
from tasks.corpora.json_rows import Row

_TEXT_FORMATS = (".txt", ".jsonl", ".json")
_COMPRESSIONS = (".gz", ".zst")
_TEXT_FILE_DOCUMENT = 16_384  # characters
_LONGEST_READ = 1 << 20  # characters; limits memory for a text file without line ends
_JSON_HINT = "; a .json file holds an array of objects, or an object per line"
_BLOCK = 1 << 18  # bytes
_PARQUET_BLOCK = 1 << 16  # bytes; small, because larger blocks would also fetch columns that are not needed
_BYTE_ORDER_MARKS = (  # UTF-32 first, because its mark begins like that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, "utf-8"),
)


def check_format(path: str) -> None:
    """Raise UserError if no format belongs to the end of the name."""
    file_format, compression = _format_of(path)
    if file_format not in (*_TEXT_FORMATS, ".parquet") or (compression and file_format == ".parquet"):
        kind = f"{file_format + compression!r} files" if file_format or compression else "files without a suffix"
        allowed = f"{', '.join(_TEXT_FORMATS)} (each also with {' or '.join(_COMPRESSIONS)}), .parquet"
        raise UserError(f"{path}: cannot read {kind}; allowed: {allowed}")


def is_compressed(path: str) -> bool:
    return bool(_format_of(path)[1])


def read_rows(path: str, field: json_rows.Field) -> Iterator[Row]:
    """Yield (place, value) for each row of a file: the value of `field`, or a part of a .txt file.

    A value is text, None for a null, or something of another type, which the caller has to refuse. `field` may name a
    field of nested objects: `meta.text`. If it is a tuple of fields, the value is the whole row, an object with at
    least those of them that the file has; none of them may occur twice in a row.
    Raises UserError, which names the file and the line, item or row, for what cannot be read.
    """
    file_format, compression = _format_of(path)
    if file_format == ".parquet":
        yield from _read_parquet(path, field)
    elif file_format == ".txt":
        with _open_text(path, compression, newline=None) as file:  # None: every line end becomes "\n"
            yield from _read_txt(file, path)
    else:
        # Many .json files hold a line per object. A file that begins with "[" is one array.
        is_array = file_format == ".json" and _first_character(path, compression) == "["
        with _open_text(path, compression, newline="\n") as file:
            if is_array:
                yield from json_rows.read_array(file, path, field)
            else:
                yield from json_rows.read_lines(file, path, field, _JSON_HINT if file_format == ".json" else "")


def _format_of(path: str) -> tuple[str, str]:
    """Format and compression by the end of the name, in lower case: ".jsonl", ".gz"; "" for none."""
    name = PurePosixPath(path.lower())
    compression = name.suffix if name.suffix in _COMPRESSIONS else ""
    return PurePosixPath(name.stem).suffix if compression else name.suffix, compression


def _first_character(path: str, compression: str) -> str:
    """The first character that is not white space. Raises UserError if there is none: JSON is never empty."""
    with _open_text(path, compression, newline="\n") as file:
        while text := file.read(_BLOCK):
            if text := text.lstrip():
                return text[0]
    raise UserError(f"{path}: empty{_JSON_HINT}")


def _read_txt(file: TextIO, path: str) -> Iterator[Row]:
    line = 1
    while text := file.read(_TEXT_FILE_DOCUMENT):
        if not text.endswith("\n"):
            text += file.readline(_LONGEST_READ)
        yield f"{path}, line {line}", text
        line += text.count("\n")


def _read_parquet(path: str, field: json_rows.Field) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    with _errors_of(path), storage.open_binary(path, _PARQUET_BLOCK) as file:
        try:
            # By default whole row groups of the column are read, and one row group may be the whole file.
            table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=storage.BLOCK_BYTES)
            if isinstance(field, tuple):
                yield from _read_records(table, field, path)
                return
            _check_column(table.schema_arrow, field, path)
            row = 0
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                name = field if field in batch.schema.names else batch.schema.names[0]
                for value in batch.column(name):
                    row += 1
                    place = f"{path}, row {row}"
                    try:
                        found = value.as_py()
                    except UnicodeDecodeError as error:
                        raise UserError(f"{place}: not valid UTF-8 ({error.reason} at byte {error.start})") from None
                    yield place, json_rows.find_field({name: found}, field, place)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not a readable parquet file ({error})") from None


def _read_records(table, fields: tuple[str, ...], path: str) -> Iterator[Row]:
    """The rows as objects, with the columns of `fields`, or with all if there is none of them."""
    row, wanted = 0, {part for name in fields for part in (name, name.partition(".")[0])}
    columns = [name for name in table.schema_arrow.names if name in wanted]
    for batch in table.iter_batches(batch_size=64, columns=columns or None):
        try:
            records = batch.to_pylist()
        except UnicodeDecodeError as error:
            place = f"{path}, rows {row + 1} to {row + len(batch)}"
            raise UserError(f"{place}: not valid UTF-8 ({error.reason} at byte {error.start})") from None
        for record in records:
            row += 1
            yield f"{path}, row {row}", without_nulls(record, fields)


def without_nulls(row: dict, fields: Iterable[str]) -> dict:
    """A copy without the nulls inside nested objects: in a table, every object of a column has the fields of all.

    The fields of the row itself are kept, and `fields`, which name nested ones by dots.
    """
    kept = {name[:end] for name in fields for end in (*(i for i, c in enumerate(name) if c == "."), len(name))}

    def copy(value, path: str):
        if isinstance(value, dict):
            inner = ((name, item, f"{path}.{name}" if path else name) for name, item in value.items())
            return {name: copy(item, at) for name, item, at in inner if item is not None or not path or at in kept}
        return [copy(item, "[]") for item in value] if isinstance(value, list) else value

    return copy(row, "")


def _check_column(schema, field: str, path: str) -> None:
    """Raise UserError if the table has no column `field`, or if that does not hold text."""
    from pyarrow import types

    column = json_rows.find_field(_columns(schema), field, path)
    if isinstance(column, dict):
        column, is_text = f"an object with the fields {json_rows.quoted(json_rows.nested_names(column))}", False
    else:
        values = column.value_type if types.is_dictionary(column) else column
        kinds = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
        is_text = any(is_kind(values) for is_kind in kinds)
    if not is_text:
        raise UserError(f"{path}: the column {field!r} holds {column}, not text; set text_field to a column of text")


def _columns(fields) -> dict:
    """Name → type; for a struct, name → the same of its fields."""
    from pyarrow import types

    return {one.name: _columns(one.type) if types.is_struct(one.type) else one.type for one in fields}


@contextmanager
def _open_text(path: str, compression: str, newline: str | None) -> Iterator[TextIO]:
    """Open a text file, without its byte-order mark. The mark decides the encoding; without one, it is UTF-8.

    Raises UserError, also while the `with` block reads: for text that is not valid, with its line, and for damaged
    compressed data.
    """
    with _open_bytes(path, compression) as (file, encoding):
        try:
            yield io.TextIOWrapper(file, encoding, newline=newline)
        except UnicodeDecodeError as error:
            line = _first_invalid_line(path, compression)
            raise UserError(f"{path}, line {line}: not valid {encoding.upper()} ({error.reason})") from None


@contextmanager
def _open_bytes(path: str, compression: str) -> Iterator[tuple[io.BufferedReader, str]]:
    """Open a file, decompressed and behind its byte-order mark, and tell its encoding."""
    with _errors_of(path, compression), storage.open_binary(path) as raw:
        file = _decompressed(raw, path, compression)
        head = file.peek(4)
        mark, encoding = next((pair for pair in _BYTE_ORDER_MARKS if head.startswith(pair[0])), (b"", "utf-8"))
        file.read(len(mark))
        yield file, encoding


def _decompressed(raw: io.BufferedReader, path: str, compression: str) -> io.BufferedReader:
    """All members (gzip) or frames (zstd) of a file, one after the other. Reading a truncated one raises an error."""
    if not compression:
        return raw
    if not raw.peek(1):
        raise UserError(f"{path}: empty, so not a {compression} file")
    if compression == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), _BLOCK)
    import pyarrow  # the reader of the package zstandard does not notice that a file is truncated

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd"), _BLOCK)


@contextmanager
def _errors_of(path: str, compression: str = "") -> Iterator[None]:
    """Raise UserError for what the disk, gzip and pyarrow raise."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        is_of_disk = isinstance(error, OSError) and error.strerror
        reason = error.strerror if is_of_disk else f"the {compression} data are truncated or damaged: {error}"
        raise UserError(f"{path}: cannot read it ({reason})") from None


def _first_invalid_line(path: str, compression: str) -> int:
    """The number of the first line that is not valid in the encoding of the file."""
    with _open_bytes(path, compression) as (file, encoding):
        decoder, line = codecs.getincrementaldecoder(encoding)(), 1
        while block := file.read(_BLOCK):
            try:
                line += decoder.decode(block).count("\n")
            except UnicodeDecodeError as error:
                return line + error.object[: error.start].decode(encoding).count("\n")
    return line  # the file ends inside a character
