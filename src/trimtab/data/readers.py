"""Reading inputs as a stream of documents that can be entered at any row."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from trimtab.data.sources import Input, Part, hub_error
from trimtab.errors import DataError

_READ_SIZE = 1 << 20


class Cursor(NamedTuple):
    """A place in the list of inputs: which one, and which of its rows."""

    input: int
    row: int


BEGINNING = Cursor(0, 0)


class Document(NamedTuple):
    """One document.

    `id` is stable across machines; `data` is its UTF-8 text; `place` is where it stands, `read` how many bytes of
    its source it took (of a .txt or .jsonl file; otherwise the length of the text).
    """

    id: str
    data: bytes
    place: Cursor
    read: int
    part: Part


@dataclass(frozen=True)
class _Row:
    number: int
    text: str
    read: int | None
    where: str


def read_documents(inputs: Sequence[Input], text_field: str, start: Cursor = BEGINNING) -> Iterator[Document]:
    """Every document from `start` on, in order. Rows without any text are passed over.

    Raises:
        DataError: a file is not UTF-8, a line is no JSON object, the field is missing or no text, a file is
            damaged, the library to read it is not installed, or the hub cannot be reached.
    """
    for number in range(start.input, len(inputs)):
        source = inputs[number]
        first = start.row if number == start.input else 0
        for row in _READERS[source.kind](source, text_field, first):
            try:
                data = row.text.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{row.where}: character {error.start} of field {text_field!r} is half of a surrogate pair, "
                    "which is no text"
                ) from error
            if data:
                read = len(data) if row.read is None else row.read
                yield Document(f"{source.name}#{row.number}", data, Cursor(number, row.number), read, source.part)


def probe(inputs: Sequence[Input], text_field: str) -> None:
    """Read the first row of every input that has rows, so that a wrong field is found before any work is done."""
    for source in inputs:
        if source.kind != "txt":
            next(_READERS[source.kind](source, text_field, 0), None)


def _txt(source: Input, text_field: str, first: int) -> Iterator[_Row]:
    if first > 0:
        return
    with opening(source.path), open(source.path, "rb") as file:
        data = file.read()
    yield _Row(0, decode(data, source.path, 0, first=True), len(data), source.path)


def _json_lines(source: Input, text_field: str, first: int) -> Iterator[_Row]:
    for number, offset, line in json_lines(source.path, source.kind):
        if number >= first:
            where = f"{source.path}:{number + 1}"
            row = json_object(decode(line, source.path, offset, first=number == 0), where)
            read = len(line) if source.kind == "jsonl" else None
            yield _Row(number, _field(row, text_field, where), read, where)


def json_lines(path: str, kind: str) -> Iterator[tuple[int, int, bytes]]:
    """The number (from 0), the offset in bytes and the bytes of each line of a .jsonl, packed or not; no blank ones."""
    chunks = {"jsonl": _plain, "jsonl.gz": unpack_gzip, "jsonl.zst": _zstd}[kind](path)
    offset = 0
    for number, line in enumerate(_lines(chunks)):
        if line.strip():
            yield number, offset, line
        offset += len(line)


def json_object(text: str, where: str) -> dict[str, Any]:
    """The object that a line of JSON holds; `where` is the line's place, for errors."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: this line is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: this line is not a JSON object but a {type(row).__name__}")
    return row


def _parquet(source: Input, text_field: str, first: int) -> Iterator[_Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source.path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise _no_field(source.path, text_field, names)
            number = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if number + rows <= first:
                    number += rows
                    continue
                for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=[text_field]):
                    for value in batch.column(0).to_pylist():
                        if number >= first:
                            where = f"{source.path}, row {number}"
                            yield _Row(number, _field({text_field: value}, text_field, where), None, where)
                        number += 1
    except UnicodeDecodeError as error:
        raise DataError(f"{source.path}: a text in field {text_field!r} is not UTF-8 ({error.reason})") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{source.path}: cannot be read as Parquet ({one_line(error)})") from error


def _hub(source: Input, text_field: str, first: int) -> Iterator[_Row]:
    import datasets

    number = first
    try:
        stream = datasets.load_dataset(
            source.path, source.subset, split=source.split, revision=source.revision, streaming=True
        )
        rows = iter(stream.skip(first) if first else stream)
    except Exception as error:  # the library raises a dozen kinds
        raise hub_error(source.path, error) from error
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            raise DataError(
                f"dataset {source.path!r}: reading stopped at row {number} ({type(error).__name__}: "
                f"{one_line(error)}); run again to go on from there"
            ) from error
        if row is None:
            return
        where = f"dataset {source.name!r}, row {number}"
        yield _Row(number, _field(row, text_field, where), None, where)
        number += 1


_READERS: dict[str, Callable[[Input, str, int], Iterator[_Row]]] = {
    "txt": _txt,
    "jsonl": _json_lines,
    "jsonl.gz": _json_lines,
    "jsonl.zst": _json_lines,
    "parquet": _parquet,
    "hub": _hub,
}


def _plain(path: str) -> Iterator[bytes]:
    with opening(path), open(path, "rb") as file:
        while chunk := file.read(_READ_SIZE):
            yield chunk


def unpack_gzip(path: str) -> Iterator[bytes]:
    """What a gzip file holds, in chunks."""
    with opening(path):
        try:
            with gzip.open(path, "rb") as file:
                while chunk := file.read(_READ_SIZE):
                    yield chunk
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path}: damaged or cut short ({one_line(error)})") from error


def _zstd(path: str) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(f"{path}: reading .zst needs zstandard: pip install 'trimtab[zst]'") from error
    # Files packed with --long need a window above the default limit.
    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    try:
        with opening(path), open(path, "rb") as file:
            frame = None
            while chunk := file.read(_READ_SIZE):
                while chunk:
                    frame = frame or unpacker.decompressobj()
                    yield frame.decompress(chunk)
                    chunk = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
            if frame is not None:  # the stream reader of this library would end here in silence
                raise DataError(f"{path}: damaged or cut short (the last frame has no end)")
    except zstandard.ZstdError as error:
        raise DataError(f"{path}: damaged or cut short ({one_line(error)})") from error


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Cut at each newline byte, which stays with its line."""
    parts: list[bytes] = []
    for chunk in chunks:
        lines = chunk.split(b"\n")
        for line in lines[:-1]:
            parts.append(line)
            yield b"".join(parts) + b"\n"
            parts.clear()
        if lines[-1]:
            parts.append(lines[-1])
    if parts:
        yield b"".join(parts)


@contextmanager
def opening(path: str) -> Iterator[None]:
    """Turn what the system says of a file into a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def decode(data: bytes, where: str, offset: int, *, first: bool) -> str:
    """UTF-8 as text; `offset` is where `data` begins in its file, `first` whether a byte-order mark may lead it."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 at byte {offset + error.start} (0x{data[error.start]:02x}); convert it first, "
            "for example with iconv"
        ) from error
    return text.removeprefix("\ufeff") if first else text  # a byte-order mark is no text


def _field(row: Mapping[str, Any], text_field: str, where: str) -> str:
    if text_field not in row:
        raise _no_field(where, text_field, list(row))
    value = row[text_field]
    if not isinstance(value, str):
        raise DataError(f"{where}: field {text_field!r} holds {type(value).__name__}, not text")
    return value


def _no_field(where: str, text_field: str, names: Sequence[str]) -> DataError:
    there = ", ".join(repr(name) for name in list(names)[:20]) or "none"
    return DataError(f"{where}: no field data.text_field={text_field!r}; the fields are {there}")


def one_line(error: BaseException) -> str:
    """The first line of what an error says; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
