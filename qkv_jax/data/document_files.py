"""Documents in files of any size: text, JSON lines and parquet, in parts that can be read alone.

Which part a document is in follows from the file and the part's size, so that any number of
processes, in any order, read the same documents of the same parts.
"""

import dataclasses
import importlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qkv_jax.data.files import decode_text

JSON_LINES = (".jsonl", ".ndjson")
PARQUET = ".parquet"  # whatever is neither is text
PIECE_BYTES = 2**20  # of a text that is encoded at once: a document may be longer than the memory


@dataclasses.dataclass(frozen=True)
class Part:
    """What is read at once: the bytes of a file, or of parquet the row groups, in [begin, end).

    A document, and a line, belongs to the part in which it begins.
    """

    path: str
    begin: int
    end: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """A text; whether a document begins with it, and whether it ends with it."""

    text: str
    begins: bool = True
    ends: bool = True


def parts_of(paths: Iterable[Path], part_bytes: int) -> list[Part]:
    """The parts of files, of about so many bytes each.

    Raises:
        ValueError: a file is empty or cannot be read.
        ImportError: there is parquet, and pyarrow is not installed.
    """
    parts = []
    for path in map(Path, paths):
        try:
            size = path.stat().st_size
            if not size:
                raise ValueError(f"{str(path)!r} is empty; wanted a file with text in it")
            if path.suffix == PARQUET:
                parts += _parquet_parts(path, part_bytes)
            else:
                begins = range(0, size, part_bytes)
                parts += [Part(str(path), begin, min(begin + part_bytes, size)) for begin in begins]
        except OSError as error:
            raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
    return parts


def pieces_of(part: Part, *, field: str = "text", separator: str | None = None) -> Iterator[Piece]:
    """The documents of a part.

    A text file is one document, in pieces that are cut where a line ends, so that no tokenizer
    needs it whole; with a `separator` it has as many as there are lines equal to that, and one
    more. Empty documents are left out.

    Args:
        part: of `parts_of`.
        field: JSON lines, parquet: the string of each line or row that is its document.
        separator: text files: the line between two documents, such as "<|endoftext|>".

    Raises:
        ValueError: naming the file, and the line, row or byte that is not as it should be.
    """
    suffix = Path(part.path).suffix
    try:
        if suffix == PARQUET:
            yield from _parquet_rows(part, field)
        elif suffix in JSON_LINES:
            yield from _json_lines(part, field)
        else:
            yield from _text(part, None if separator is None else separator.encode("utf-8"))
    except OSError as error:
        raise ValueError(f"{part.path!r} cannot be read: {error}") from error


# --- text ----------------------------------------------------------------------------------------


def _text(part: Part, separator: bytes | None) -> Iterator[Piece]:
    with open(part.path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if separator is None:
            begin, end = _cut(file, part.begin), _cut(file, part.end)
            yield from _pieces(file, begin, end, begins=begin == 0, ends=end == size)
            return
        for begin, end in _separated(file, part, separator):
            yield from _pieces(file, begin, end, begins=True, ends=True)


def _pieces(file: BinaryIO, begin: int, end: int, *, begins: bool, ends: bool) -> Iterator[Piece]:
    """The bytes from `begin` to `end`; whether a document begins and ends with them."""
    while begin < end:
        stop = min(_cut(file, begin + PIECE_BYTES), end) if begin + PIECE_BYTES < end else end
        file.seek(begin)
        text = decode_text(file.read(stop - begin), repr(file.name), begin)
        if text or not begins:  # a byte-order mark alone is no document
            yield Piece(text, begins, ends and stop == end)
        begin, begins = stop, False


def _cut(file: BinaryIO, at: int) -> int:
    """The first place from byte `at` on where a text may be cut in two: before the end of a line.

    GPT-2's rule begins a token there, unless the line ends with a space. 0, and the file's end, are
    such places too.
    """
    if at == 0:
        return 0
    file.seek(at)
    while line := file.readline():
        content = _content(line)
        last = content[-4:].decode("utf-8", "ignore")[-1:]  # none: `at` is within a character
        if content < line and last and not last.isspace():
            return file.tell() - len(line) + len(content)
    return os.fstat(file.fileno()).st_size


def _separated(file: BinaryIO, part: Part, separator: bytes) -> list[tuple[int, int]]:
    """Where the documents begin and end whose separating line, or the file, begins in the part."""
    found, begin = [], 0 if part.begin == 0 else None  # of the document that we are in
    at = end = _line_begin(file, part.begin)
    while (at < part.end or begin is not None) and (line := file.readline()):
        if _content(line) == separator:
            if begin is not None:
                found.append((begin, end))
            begin = at + len(line) if at < part.end else None
        at += len(line)
        end = at - len(line) + len(_content(line))  # of a document whose last line this is
    return found if begin is None else [*found, (begin, end)]


def _content(line: bytes) -> bytes:
    """A line without its end."""
    return line.removesuffix(b"\n").removesuffix(b"\r") if line.endswith(b"\n") else line


def _line_begin(file: BinaryIO, at: int) -> int:
    """Where the first line that begins at `at` or later begins, to which the file is wound."""
    file.seek(max(at - 1, 0))
    if at:
        file.readline()
    return file.tell()


# --- JSON lines ----------------------------------------------------------------------------------


def _json_lines(part: Part, field: str) -> Iterator[Piece]:
    with open(part.path, "rb") as file:
        begin = _line_begin(file, part.begin)
        while begin < part.end and (line := file.readline()):
            if line.strip():
                try:
                    text = _json_text(decode_text(line, "the line", begin), field)
                except ValueError as error:
                    number = 1 + _line_ends(part.path, begin)
                    raise ValueError(f"{part.path!r}, line {number}: {error}") from error
                if text:
                    yield Piece(text)
            begin += len(line)


def _json_text(line: str, field: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"wanted an object with a string {field!r}, got {found}")
    text = value[field]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{field!r} has half a character, {text[error.start]!a}") from error
    return text


def _line_ends(path: str, before: int) -> int:
    """How many lines end before a byte of a file."""
    count = 0
    with open(path, "rb") as file:
        while before > 0 and (block := file.read(min(before, 2**20))):
            count += block.count(b"\n")
            before -= len(block)
    return count


# --- parquet -------------------------------------------------------------------------------------


def _parquet_parts(path: Path, part_bytes: int) -> list[Part]:
    metadata = _parquet_file(str(path)).metadata
    parts, begin, held = [], 0, 0
    for group in range(metadata.num_row_groups):
        held += metadata.row_group(group).total_byte_size
        if held >= part_bytes or group == metadata.num_row_groups - 1:
            parts.append(Part(str(path), begin, group + 1))
            begin, held = group + 1, 0
    return parts


def _parquet_rows(part: Part, field: str) -> Iterator[Piece]:
    file = _parquet_file(part.path)
    if field not in file.schema_arrow.names:
        raise ValueError(
            f"{part.path!r}: wanted a column {field!r}, got {sorted(file.schema_arrow.names)}"
        )
    row = sum(file.metadata.row_group(group).num_rows for group in range(part.begin))
    groups = list(range(part.begin, part.end))
    for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=[field]):
        for text in batch.column(0).to_pylist():
            row += 1
            if not isinstance(text, str):
                kind = type(text).__name__
                raise ValueError(f"{part.path!r}, row {row}: wanted a string {field!r}, got {kind}")
            if text:
                yield Piece(text)


def _parquet_file(path: str) -> Any:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError("parquet files need a package: pip install pyarrow") from error
    try:
        return parquet.ParquetFile(path)
    except ValueError as error:  # pyarrow's own errors are ValueErrors too
        raise ValueError(f"{path!r} is not parquet: {error}") from error
